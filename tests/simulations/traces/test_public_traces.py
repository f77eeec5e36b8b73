"""The public traces against the statistics that were computed from them independently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pagedkv.simulations.traces import Trace, load_trace, write_trace

Find = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "format_name", "num_requests", "prompt", "output", "span_s"),
    [
        ("azure_llm_2023_conv.csv.gz", "azure", 19366, (1154.7, 1020, 14050), (211.1, 129, 1000), 3501.7),
        ("azure_llm_2023_code.csv.gz", "azure", 8819, (2047.8, 1469, 7437), (27.9, 13, 1899), 3435.9),
        (
            "mooncake_fast25_conversation.jsonl.gz",
            "mooncake",
            12031,
            (12035.1, 6909, 126195),
            (342.6, 350, 2000),
            3537.0,
        ),
        ("vtc_arena_clients.csv.gz", "csv", 1500, (136.3, 40, 1021), (256.2, 211, 977), 600.0),
        ("agentic_coding_sessions.jsonl.gz", "agentic", 49334, (122379.0, 103659, 894371), (440.1, 216, 18195), None),
    ],
)
def test_lengths_are_those_published(
    shared_trace: Find,
    name: str,
    format_name: str,
    num_requests: int,
    prompt: tuple[float, int, int],
    output: tuple[float, int, int],
    span_s: float | None,
) -> None:
    trace = load_trace(shared_trace(name))
    description = trace.describe()
    assert trace.format == format_name
    assert len(trace) == num_requests
    for key, (mean, median, longest) in {"prompt_tokens": prompt, "output_tokens": output}.items():
        lengths = description[key]
        assert (round(lengths["mean"], 1), lengths["p50"], lengths["max"]) == (mean, median, longest)
    assert span_s is None or round(description["span_s"], 1) == span_s


@pytest.mark.parametrize(("name", "cv"), [("conv", 1.09), ("code", 13.15)])
def test_burstiness_is_that_published(shared_trace: Find, name: str, cv: float) -> None:
    description = load_trace(shared_trace(f"azure_llm_2023_{name}.csv.gz")).describe()
    assert round(description["interarrival_cv"], 2) == cv


def test_mooncake_ceilings_are_those_published(shared_trace: Find) -> None:
    content = load_trace(shared_trace("mooncake_fast25_conversation.jsonl.gz")).describe()["content"]
    assert (content["num_blocks"], content["num_unique_blocks"]) == (288_500, 182_790)
    assert (round(content["block_hit_ratio"], 4), round(content["token_hit_ratio"], 4)) == (0.3664, 0.3736)


def test_agentic_ceilings_are_those_published_without_expanding_94_million_ids(shared_trace: Find) -> None:
    trace = load_trace(shared_trace("agentic_coding_sessions.jsonl.gz"))
    description = trace.describe()
    content = description["content"]
    assert content["num_blocks"] == 94_310_647
    assert (round(content["block_hit_ratio"], 4), round(content["token_hit_ratio"], 4)) == (0.9634, 0.9632)
    assert len(trace.run_starts) == 165_243
    assert description["num_prefill_only"] == 27
    assert description["num_clients"] == 710


def test_a_gap_moves_agentic_sessions_but_not_their_reuse(shared_trace: Find) -> None:
    path = shared_trace("agentic_coding_sessions.jsonl.gz")
    together, staggered = load_trace(path), load_trace(path, session_gap_s=60.0)
    assert staggered.arrival_s[-1] > together.arrival_s[-1]
    assert staggered.describe()["content"] == together.describe()["content"]


def test_vtc_clients_send_as_many_requests_as_published(shared_trace: Find) -> None:
    trace = load_trace(shared_trace("vtc_arena_clients.csv.gz"))
    assert trace.clients is not None
    counts = [int((trace.clients == client).sum()) for client in range(27)]
    assert (counts[2], counts[10], counts[0], counts[26]) == (296, 262, 199, 1)


@pytest.mark.parametrize(
    "name", ["vtc_arena_clients.csv.gz", "mooncake_fast25_conversation.jsonl.gz", "agentic_coding_sessions.jsonl.gz"]
)
def test_converting_a_public_trace_keeps_every_request(shared_trace: Find, tmp_path: Path, name: str) -> None:
    trace = load_trace(shared_trace(name))
    digest = write_trace(trace, tmp_path / "plain.jsonl.gz")
    again: Trace = load_trace(tmp_path / "plain.jsonl.gz")
    assert again.format == "jsonl"
    assert again.has_same_requests(trace)
    assert again.digest == digest
