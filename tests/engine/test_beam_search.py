"""Beam search finds what transformers' own finds, through forks and copy-on-write."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_model

from pagedkv import InvalidArgumentError, OutOfBlocksError
from pagedkv.engine import LLM, BeamSearchParams, SamplingParams

PROMPTS = [np.random.default_rng(3).integers(1, VOCABULARY, length).tolist() for length in (7, 12, 21)]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def expected(model: Any, prompt: list[int], params: BeamSearchParams, ends: list[int] | None) -> list[tuple[int, ...]]:
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=params.max_tokens,
        num_beams=params.num_beams,
        num_return_sequences=params.num_beams,
        do_sample=False,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=ends,
        pad_token_id=0,
    )
    texts = []
    for row in out[:, len(prompt) :].tolist():
        ended = [i for i, token in enumerate(row) if ends and token in ends]
        texts.append(tuple(row[: ended[0] + 1] if ended else row))
    return texts


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("num_ends", [0, 1, 30])
@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_beams_equal_those_of_generate(
    model: Any, num_beams: int, num_ends: int, length_penalty: float, early_stopping: bool
) -> None:
    if num_beams == 1:
        early_stopping, length_penalty = False, 1.0
    params = BeamSearchParams(
        num_beams=num_beams, max_tokens=14, length_penalty=length_penalty, early_stopping=early_stopping
    )
    ends = list(range(5, 5 + num_ends))
    llm = LLM(model, num_blocks=200, block_size=4, self_check=False)
    llm.engine.end_token_ids = tuple(ends)

    found = llm.beam_search(PROMPTS, params)

    assert [[beam.token_ids for beam in beams] for beams in found] == [
        expected(model, prompt, params, ends or None) for prompt in PROMPTS
    ]
    llm.engine.scheduler.check_invariants()
    assert llm.engine.scheduler.manager.statistics().num_used == 0


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_a_search_that_never_stops_early_goes_on_while_a_longer_text_may_win(seed: int) -> None:
    model = make_model("llama", vocab_size=12, seed=seed)
    params = BeamSearchParams(num_beams=3, max_tokens=20, length_penalty=2.0, early_stopping="never")
    with torch.no_grad():
        model.lm_head.weight.mul_(15)  # Else all tokens are about as likely, and every text is as good as another.
    llm = LLM(model, num_blocks=200, block_size=4, self_check=False)
    llm.engine.end_token_ids = (1,)

    found = llm.beam_search([5, 6, 7], params)[0]

    assert [beam.token_ids for beam in found] == expected(model, [5, 6, 7], params, [1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"early_stopping": "always"}, "early_stopping must be True, False or \"never\", found 'always'"),
        ({"early_stopping": 1}, "early_stopping must be"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, found 'no'"),
        ({"length_penalty": True}, "length_penalty must be a number, found True"),
        ({"length_penalty": float("nan")}, "length_penalty must be in -100..100, found nan"),
    ],
    ids=str,
)
def test_params_of_another_kind_are_refused(values: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        BeamSearchParams(**values)


def test_numbers_of_numpy_become_pythons_own() -> None:
    params = BeamSearchParams(num_beams=np.int64(2), max_tokens=np.int32(3), length_penalty=np.float32(0.5))

    assert repr(params) == repr(BeamSearchParams(num_beams=2, max_tokens=3, length_penalty=0.5))


def test_prompts_wait_for_blocks_and_find_the_same(model: Any) -> None:
    params = BeamSearchParams(num_beams=3, max_tokens=10)
    ample = LLM(model, num_blocks=200, block_size=4, self_check=False).beam_search(PROMPTS, params)
    tight = LLM(model, num_blocks=20, block_size=4, max_num_batched_tokens=5, max_num_running=5, self_check=False)

    found = tight.beam_search(PROMPTS, params)

    assert [[beam.token_ids for beam in beams] for beams in found] == [
        [beam.token_ids for beam in beams] for beams in ample
    ]
    assert found[0][0].score == pytest.approx(ample[0][0].score, rel=1e-5)
    assert tight.engine.scheduler.manager.statistics().num_used == 0


def test_a_search_that_can_never_fit_is_refused_with_the_arithmetic(model: Any) -> None:
    llm = LLM(model, num_blocks=8, block_size=4, self_check=False)

    with pytest.raises(InvalidArgumentError, match="can need 21 blocks, there are 8"):
        llm.beam_search(PROMPTS[0], BeamSearchParams(num_beams=4, max_tokens=12))

    assert llm.engine.scheduler.manager.statistics().num_used == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("failing_pass", "num_cached"), [(1, 0), (4, 20)])  # The 4th computes the 24th token.
def test_a_search_that_fails_leaves_no_block_and_nothing_that_was_not_computed(
    model: Any, monkeypatch: pytest.MonkeyPatch, failing_pass: int, num_cached: int, error: type[BaseException]
) -> None:
    greedy, params = SamplingParams(temperature=0, max_tokens=8), BeamSearchParams(num_beams=1, max_tokens=8)
    prompt = PROMPTS[2]
    right = LLM(model, num_blocks=64, block_size=4, self_check=False).generate([prompt], greedy)[0].token_ids
    llm = LLM(model, num_blocks=64, block_size=4, self_check=False)
    forward, passes = llm.engine.model.forward, iter(range(1, 100))

    def fail_once(step: Any) -> Any:
        if next(passes) == failing_pass:
            raise error
        return forward(step)

    monkeypatch.setattr(llm.engine.model, "forward", fail_once)
    with pytest.raises(error):
        llm.beam_search(prompt, params)

    assert llm.engine.scheduler.manager.statistics().num_used == 0
    output = llm.generate([[*prompt, *right[:4]]], SamplingParams(temperature=0, max_tokens=4))[0]
    assert (output.token_ids, output.timings.num_cached_tokens) == (right[4:], num_cached)
    assert llm.beam_search(prompt, params)[0][0].token_ids == right


@pytest.fixture
def pythons_own_handler() -> Iterator[None]:
    """Python's handler of SIGINT, which a test run in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_search_shares_blocks_with_prompts_of_its_salt_only(model: Any) -> None:
    llm = LLM(model, num_blocks=64, block_size=4, self_check=False)
    llm.beam_search(PROMPTS[2], BeamSearchParams(num_beams=2, max_tokens=2), salt=b"tenant")

    one = SamplingParams(max_tokens=1)
    others = llm.generate(PROMPTS[2], one)[0].timings.num_cached_tokens
    own = llm.generate(PROMPTS[2], one, salt=b"tenant")[0].timings.num_cached_tokens

    assert (others, own) == (0, 20)


def test_a_search_that_does_not_fit_beside_what_runs_says_so_and_fits_later(model: Any) -> None:
    llm = LLM(model, num_blocks=16, block_size=4, self_check=False)
    stream = llm.stream(list(range(1, 41)), SamplingParams(temperature=0, max_tokens=20))
    next(stream)
    params = BeamSearchParams(num_beams=2, max_tokens=8)
    for _ in range(2):
        with pytest.raises(OutOfBlocksError, match="13 blocks requested, 6 can be had"):
            llm.beam_search(PROMPTS[2], params)
    stream.close()
    assert len(llm.beam_search(PROMPTS[2], params)[0]) == 2


def test_as_many_new_tokens_may_be_asked_for_as_a_sequence_has_at_most() -> None:
    assert BeamSearchParams(max_tokens=2**26).max_tokens == 2**26
    with pytest.raises(InvalidArgumentError, match=r"max_tokens must be in 1\.\.67108864"):
        BeamSearchParams(max_tokens=2**26 + 1)


@pytest.mark.usefixtures("pythons_own_handler")
@pytest.mark.parametrize("verb", ["open", "fork", "close", "append"])
def test_ctrl_c_in_the_bookkeeping_of_a_search_leaves_no_block(
    model: Any, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model, num_blocks=64, block_size=4, self_check=False)
    manager = llm.engine.scheduler.manager
    do = getattr(manager, verb)
    num_calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        result = do(*args, **options)
        if num_calls == 1:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(manager, verb, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.beam_search(PROMPTS[:1], BeamSearchParams(num_beams=3, max_tokens=8))

    assert num_calls
    assert manager.statistics().num_used == 0
    manager.check_invariants()
