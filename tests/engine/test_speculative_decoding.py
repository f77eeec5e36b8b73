"""With drafts, verified in the same step, the engine says exactly what it says without."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from families import VOCABULARY, make_model

from pagedkv import ConfigError
from pagedkv.engine import LLM, DraftModelDrafter, NgramDrafter, SamplingParams
from pagedkv.engine.speculation import Drafter
from pagedkv.scheduler import SchedulerConfig

POOLS = {"ample": (64, None), "tight, recompute": (26, None), "tight, swap": (26, "1MiB")}
DRAFTERS = ("n-gram", "the same model", "another model")
PARAMS = [
    SamplingParams(max_tokens=20, temperature=0),
    SamplingParams(max_tokens=20, temperature=0, logprobs=2),
    SamplingParams(max_tokens=20, temperature=0.7, seed=5),
    SamplingParams(max_tokens=20, temperature=0.5, seed=6, n=2),
    SamplingParams(max_tokens=20, temperature=0, repetition_penalty=1.3),
]


@cache
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(1, VOCABULARY, 6).tolist() * 9)[:length] for length in (5, 17, 33, 48, 12)]


@cache
def model_of(family: str, seed: int = 0) -> Any:
    return make_model(family, seed=seed)


def make_drafter(kind: str, family: str) -> Drafter:
    if kind == "n-gram":
        return NgramDrafter(min_ngram=1)
    return DraftModelDrafter(model_of(family, int(kind == "another model")), num_blocks=80, block_size=4)


@cache
def plain(family: str) -> list[list[tuple[int, ...]]]:
    return tokens_of(LLM(model_of(family), num_blocks=128, block_size=4, self_check=False))


def tokens_of(llm: LLM) -> list[list[tuple[int, ...]]]:
    outputs = llm.generate(prompts(), PARAMS)
    return [[completion.token_ids for completion in output.completions] for output in outputs]


@pytest.mark.parametrize("budget", [11, 512])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gemma3"])
def test_tokens_are_those_of_plain_decoding(family: str, kind: str, pool: str, budget: int) -> None:
    num_blocks, swap_memory = POOLS[pool]
    drafter = make_drafter(kind, family)
    llm = LLM(
        model_of(family),
        num_blocks=num_blocks,
        block_size=4,
        swap_memory=swap_memory,
        scheduler_config=SchedulerConfig(budget, 6),
        drafter=drafter,
        self_check=False,
    )

    assert tokens_of(llm) == plain(family)

    llm.engine.scheduler.check_invariants()
    assert llm.engine.scheduler.manager.statistics().num_used == 0
    if isinstance(drafter, DraftModelDrafter):
        assert drafter.manager.statistics().num_used == 0


def test_a_good_drafter_takes_fewer_steps() -> None:
    steps = {}
    for kind in (None, "the same model"):
        drafter = None if kind is None else make_drafter(kind, "llama")
        llm = LLM(model_of("llama"), num_blocks=64, block_size=4, drafter=drafter, self_check=False)
        llm.generate(prompts()[1], PARAMS[0])
        steps[kind] = llm.metrics().iteration_tokens_total.count

    assert steps == {None: 20, "the same model": 5}


def test_a_stop_token_and_a_stream_end_within_accepted_drafts() -> None:
    expected = plain("llama")[1][0]
    llm = LLM(model_of("llama"), num_blocks=64, block_size=4, drafter=make_drafter("the same model", "llama"))
    stop = next(token for i, token in enumerate(expected) if i >= 6 and token not in expected[:i])
    params = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=[stop], logprobs=0)

    pieces = list(llm.stream(prompts()[1], params))

    tokens = sum((piece.token_ids for piece in pieces), ())
    assert tokens == expected[: expected.index(stop) + 1]
    assert sum(len(piece.logprobs) for piece in pieces) == len(tokens)
    assert (pieces[-1].finish_reason, pieces[-1].stop) == ("stop", stop)
    assert len(pieces) < len(tokens)


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    drafter = DraftModelDrafter(make_model("llama", vocab_size=150), num_blocks=8, block_size=4)

    with pytest.raises(ConfigError, match=r"150.*160|160.*150"):
        LLM(model_of("llama"), num_blocks=64, drafter=drafter, self_check=False)


class Broken:
    """An n-gram drafter that raises whenever one of its verbs is called."""

    def __init__(self, verb: str) -> None:
        self.drafter = NgramDrafter(min_ngram=1)
        self.verb = verb

    def __getattr__(self, name: str) -> Any:
        if name != self.verb:
            return getattr(self.drafter, name)

        def fail(*_arguments: Any, **_more: Any) -> None:
            raise OSError("the drafter's server is gone")

        return fail


@pytest.mark.parametrize("verb", ["begin", "extend", "end", "propose"])
def test_a_drafter_that_raises_ends_no_request_and_is_counted(verb: str) -> None:
    llm = LLM(model_of("llama"), num_blocks=128, block_size=4, self_check=False, drafter=Broken(verb))

    assert tokens_of(llm) == plain("llama")
    assert llm.metrics().num_drafter_errors > 0
    assert llm.metrics().num_failed_steps == 0
    llm.close()


@pytest.mark.parametrize("guess", [np.array([VOCABULARY], np.int32), np.array([-1]), np.array([1.5]), None])
def test_a_guess_that_is_no_token_ends_no_request_and_is_counted(guess: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramDrafter, "propose", lambda _self, keys, _limits: [guess] * len(keys))
    llm = LLM(model_of("llama"), num_blocks=128, block_size=4, self_check=False, drafter=NgramDrafter(min_ngram=1))

    assert tokens_of(llm) == plain("llama")
    assert llm.metrics().num_drafter_errors > 0
    assert llm.metrics().num_failed_steps == 0


def test_a_drafter_guesses_for_one_llm_at_a_time() -> None:
    drafter = NgramDrafter()
    first = LLM(model_of("llama"), num_blocks=16, self_check=False, drafter=drafter)

    with pytest.raises(ConfigError, match="guesses for another engine, which was not closed"):
        LLM(model_of("llama"), num_blocks=16, self_check=False, drafter=drafter)
    first.close()

    LLM(model_of("llama"), num_blocks=16, self_check=False, drafter=drafter).close()
