from __future__ import annotations

import gzip
from importlib import resources
from typing import Any

import numpy as np
import pytest

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.traces import (
    LengthDistribution,
    SharedPrefixes,
    Trace,
    generate_trace,
    sample_trace,
    write_trace,
)
from pagedkv.simulations.traces.sample import generate_sample


def generate(num_requests: int = 4000, **changes: Any) -> Trace:
    return generate_trace(num_requests, rng=np.random.default_rng(1), **changes)


def test_the_same_seed_gives_the_same_trace() -> None:
    assert generate(50).digest == generate(50).digest


@pytest.mark.parametrize("burstiness", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    description = generate(rate=5.0, burstiness=burstiness).describe()
    assert description["requests_per_s"] == pytest.approx(5.0, rel=0.15)
    assert description["interarrival_cv"] == pytest.approx(burstiness, rel=0.1, abs=1e-3)


def test_lengths_have_the_median_and_the_maximum_asked_for() -> None:
    trace = generate(prompt=LengthDistribution(100, 1.0, 300), output=LengthDistribution(20, 0.0, 300))
    assert np.median(trace.prompt_tokens) == pytest.approx(100, rel=0.1)
    assert (trace.prompt_tokens.min() >= 1, trace.prompt_tokens.max()) == (True, 300)
    assert set(trace.output_tokens.tolist()) == {20}


def test_a_share_of_the_prompts_begins_with_a_shared_prefix() -> None:
    prefixes = SharedPrefixes(num_prefixes=2, num_tokens=10, share=0.5, block_size=4)
    trace = generate(prompt=LengthDistribution(3, 0.0, 3), prefixes=prefixes)
    first_ids = np.array([trace.content_ids(i)[0] for i in range(len(trace))])
    # Ten tokens are two full blocks; the third belongs to the request. Prefix 0 is ids 0 and 1, prefix 1 is ids 2 and 3.
    is_shared = first_ids < 4
    assert is_shared.mean() == pytest.approx(0.5, abs=0.05)
    assert set(first_ids[is_shared].tolist()) == {0, 2}
    assert set(trace.prompt_tokens[is_shared].tolist()) == {13}
    assert set(trace.prompt_tokens[~is_shared].tolist()) == {3}
    assert set(trace.num_content_ids()[is_shared].tolist()) == {4}
    assert trace.describe()["content"]["num_unique_blocks"] == 4 + 2 * is_shared.sum() + (~is_shared).sum()


def test_clients_have_harmonic_weights() -> None:
    trace = generate(num_clients=2)
    assert trace.clients is not None
    assert np.mean(trace.clients == 0) == pytest.approx(2 / 3, abs=0.03)


def test_without_prefixes_or_clients_the_trace_has_neither() -> None:
    trace = generate(2)
    assert trace.clients is None
    assert trace.content_block_size is None


@pytest.mark.parametrize(
    "change",
    [
        {"num_requests": 0},
        {"num_requests": 10_000_001},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"rate": 1e-300},
        {"burstiness": -1.0},
        {"burstiness": 1e-200},
        {"burstiness": float("nan")},
        {"num_clients": 0},
        {"prefixes": SharedPrefixes(1, 2**24 - 1)},
    ],
)
def test_parameters_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        generate(**({"num_requests": 10} | change))


@pytest.mark.parametrize("parameters", [(0, 1, 1), (float("nan"), 1, 1), (1, -1, 1), (1, float("nan"), 1), (1, 1, 0)])
def test_lengths_that_cannot_be_are_refused(parameters: tuple[float, float, int]) -> None:
    with pytest.raises(InvalidArgumentError):
        LengthDistribution(*parameters)


@pytest.mark.parametrize(
    "parameters", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1.5, 1), (1, 1, float("nan"), 1), (1, 1, 1, 0)]
)
def test_prefixes_that_cannot_be_are_refused(parameters: tuple[int, int, float, int]) -> None:
    with pytest.raises(InvalidArgumentError):
        SharedPrefixes(*parameters)


def test_the_sample_has_400_requests_in_two_minutes_from_3_clients() -> None:
    description = sample_trace().describe()
    assert (description["name"], description["format"]) == ("sample", "jsonl")
    assert (description["num_requests"], description["num_clients"]) == (400, 3)
    assert 100 < description["span_s"] < 140
    assert 0.1 < description["content"]["block_hit_ratio"] < 0.4


def test_the_sample_is_generated_again_byte_for_byte(tmp_path: Any) -> None:
    shipped = (resources.files("pagedkv.simulations.traces") / "sample.jsonl.gz").read_bytes()
    assert len(shipped) < 40_000
    write_trace(generate_sample(), tmp_path / "sample.jsonl.gz")
    # Compressed bytes may differ between builds of zlib; what they hold may not.
    assert gzip.decompress((tmp_path / "sample.jsonl.gz").read_bytes()) == gzip.decompress(shipped)
    assert generate_sample().digest == sample_trace().digest
