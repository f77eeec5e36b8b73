"""The engine's loop by itself: times, callbacks, what it trusts of a caller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_model

from pagedkv.engine import LLM, RequestOutput, SamplingParams
from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.run_records import read_run

MODEL = make_model("llama")
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def make_llm(**options: Any) -> LLM:
    return LLM(MODEL, **({"num_blocks": 64, "block_size": 4, "self_check": False} | options))


def ids(*token_ids: int) -> Any:
    return np.array(token_ids, np.int32)


def fail(_known: Any, _logits: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("a processor's bug")


class Clock:
    """Stands still unless it is turned on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_that_fails_at_its_first_token_had_none_and_its_record_is_read(tmp_path: Path) -> None:
    with make_llm(max_num_batched_tokens=16, max_num_running=4, record=tmp_path / "run") as llm:
        bad, good = llm.generate(
            [[5] * 40, [6] * 8], [SamplingParams(max_tokens=4, logits_processor=fail), SamplingParams(max_tokens=4)]
        )

    assert (bad.finish_reason, bad.token_ids) == ("error", ())
    assert bad.timings.ttft_s is None
    assert good.timings.ttft_s is not None
    assert len(read_run(tmp_path / "run").requests.end_s) == 2


def test_a_request_counts_from_before_its_prompt_was_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    llm = make_llm(clock=clock)

    def take_two_seconds(text: str) -> list[int]:
        clock.now += 2
        return [len(text)]

    monkeypatch.setattr(llm, "_encode", take_two_seconds)

    first, second = (output.timings for output in llm.generate(["some", "text"], GREEDY))

    assert (first.arrival_s, second.arrival_s) == (0.0, 0.0)
    assert (first.ttft_s, second.ttft_s) == (4.0, 4.0)


def test_the_first_token_is_there_when_it_was_brought_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    llm = make_llm(clock=clock)
    sample = llm.engine._sampler.sample

    def wait_for_the_device(*args: Any) -> Any:
        clock.now += 5
        return sample(*args)

    monkeypatch.setattr(type(llm.engine._sampler), "sample", lambda _, *args: wait_for_the_device(*args))
    timings = llm.generate([1, 2, 3], SamplingParams(max_tokens=1))[0].timings

    assert timings.ttft_s == timings.e2e_s == 5.0
    assert llm.metrics().time_to_first_token_seconds.total == 5.0


def test_a_request_arrives_when_its_caller_says(tmp_path: Path) -> None:
    clock = Clock()
    ended: list[RequestOutput] = []
    with make_llm(clock=clock, record=tmp_path / "run") as llm:
        clock.now = 9.0
        # Of two threads that hand requests in at about the same time, either may come first.
        for request_id, arrival_s in (("a", 7.0), ("b", 6.0)):
            llm.engine.add(request_id, ids(1, 2), GREEDY, on_finish=ended.append, arrival_s=arrival_s)
        with pytest.raises(InvalidArgumentError, match=r"arrival_s 9\.5 lies ahead"):
            llm.engine.add("c", ids(1, 2), GREEDY, on_finish=ended.append, arrival_s=9.5)
        while llm.engine.has_work:
            llm.engine.step()
        assert llm.metrics().e2e_request_latency_seconds.total == 5.0

    assert [(output.timings.queue_s, output.timings.e2e_s) for output in ended] == [(2.0, 2.0), (3.0, 3.0)]
    lines = (tmp_path / "run" / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["arrival_s"] for line in lines] == [7.0, 7.0]


def test_a_callback_may_abort_who_ended_partly_in_the_same_step() -> None:
    """`a` ends in step 3 and has `b` aborted, of which sample 0 ends in that step; `d` ends in it too."""
    llm = make_llm()
    engine = llm.engine
    ended: list[RequestOutput] = []
    (both,) = make_llm().generate([1, 2, 3], SamplingParams(max_tokens=6, n=2, seed=5))
    one, other = (completion.token_ids for completion in both.completions)
    stop = next(token for token in one if token not in other)
    num_tokens = one.index(stop) + 1
    last = make_llm().generate([1, 2, 3], SamplingParams(max_tokens=num_tokens, seed=11))[0].token_ids[-1]
    alone = SamplingParams(max_tokens=20, min_tokens=num_tokens - 1, seed=11, stop_token_ids=[last])

    def abort_b(output: RequestOutput) -> None:
        ended.append(output)
        if engine.is_live("b"):
            engine.abort("b")

    forked = SamplingParams(max_tokens=6, n=2, seed=5, stop_token_ids=[stop])
    engine.add("a", ids(1, 2, 3), alone, on_finish=abort_b)
    engine.add("b", ids(1, 2, 3), forked, on_finish=ended.append)
    engine.add("d", ids(1, 2, 3), alone, on_finish=ended.append)
    for _ in range(num_tokens):
        engine.step()

    assert sorted(output.request_id for output in ended) == ["a", "b", "d"]
    reasons = {output.request_id: [each.finish_reason for each in output.completions] for output in ended}
    assert reasons == {"a": ["stop"], "b": ["stop", "abort"], "d": ["stop"]}
    tokens_of_b = next(output for output in ended if output.request_id == "b").completions[0].token_ids
    assert tokens_of_b == one[:num_tokens]
    assert not engine.has_work
    llm.close()


def test_who_ends_in_a_step_is_live_to_no_callback_of_it() -> None:
    llm = make_llm()
    engine = llm.engine
    seen: list[bool] = []
    engine.add("a", ids(1, 2), GREEDY, on_finish=lambda _: seen.append(engine.is_live("b")))
    engine.add("b", ids(3, 4), GREEDY, on_finish=lambda _: seen.append(engine.is_live("a")))
    while engine.has_work:
        engine.step()

    assert seen == [False, False]


def test_an_aborted_request_tells_how_often_it_was_preempted(tmp_path: Path) -> None:
    llm = make_llm(num_blocks=10, record=tmp_path / "run")
    engine = llm.engine
    ended: list[RequestOutput] = []
    for number in range(3):
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        engine.add(str(number), np.full(8, number + 3, np.int32), params, on_finish=ended.append)
    while engine.metrics().num_preemptions < 2:
        engine.step()
    for number in range(3):
        if engine.is_live(str(number)):
            engine.abort(str(number))
    llm.close()

    assert sum(output.timings.num_preemptions for output in ended) == 2
    lines = (tmp_path / "run" / "trace.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["samples"][0]["num_preemptions"] for line in lines) == 2


def test_a_request_that_fails_in_its_first_step_had_a_seat(tmp_path: Path) -> None:
    with make_llm(record=tmp_path / "run") as llm:
        llm.generate(
            [[5] * 40, [6] * 8], [SamplingParams(max_tokens=4, logits_processor=fail), SamplingParams(max_tokens=4)]
        )

    record = read_run(tmp_path / "run")
    assert len(record.requests.end_s) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_never_admitted"] == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1, VOCABULARY], GREEDY, "the prompt holds"),
        ([], GREEDY, "found none"),
        ([1] * 500, SamplingParams(max_tokens=20), "exceed the model's"),
        ([-1], GREEDY, "-1"),
        ([1], SamplingParams(stop="x"), "need a tokenizer"),
    ],
)
def test_adding_checks_all_that_a_request_may_not_exceed(
    prompt: list[int], params: SamplingParams, message: str
) -> None:
    llm = make_llm(num_blocks=1000)

    with pytest.raises(InvalidArgumentError, match=message):
        llm.engine.add("a", prompt, params, on_finish=print)

    assert not llm.engine.has_work


@pytest.mark.parametrize("make", [list, np.array, lambda ids: np.array(ids, np.int32)])
def test_adding_takes_a_prompt_as_it_is_then(make: Callable[[list[int]], Any]) -> None:
    llm = make_llm()
    expected = llm.generate([1, 2, 3], GREEDY)[0]
    ended: list[RequestOutput] = []
    prompt = make([1, 2, 3])
    llm.engine.add("a", prompt, GREEDY, on_finish=ended.append)
    prompt[:] = prompt[:0] if isinstance(prompt, list) else 7
    while llm.engine.has_work:
        llm.engine.step()

    assert (ended[0].prompt_token_ids, ended[0].token_ids) == ((1, 2, 3), expected.token_ids)


def test_a_refused_request_changes_nobodys_seed() -> None:
    expected = make_llm().generate([1, 2, 3], SamplingParams(max_tokens=12))[0].token_ids
    llm = make_llm()
    with pytest.raises(InvalidArgumentError):
        llm.engine.add("a", ids(1, 2), SamplingParams(max_tokens=400), on_finish=print)

    assert llm.generate([1, 2, 3], SamplingParams(max_tokens=12))[0].token_ids == expected
