"""What happens to one request does not happen to the others: cancels, errors, interrupts; and no block is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model

from pagedkv.engine import LLM, AsyncLLM, ModelStepError, RequestOutput, SamplingParams
from pagedkv.engine.sampling import BadLogitsError, Sampler
from pagedkv.engine.step_inputs import StepInputs

MODEL = make_model("llama")
POISON = 159
PROMPTS = [[1 + i, 2, 3 + i, 4, 5] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=10)
RANDOM = SamplingParams(max_tokens=10, seed=1)


def make_llm(**options: Any) -> LLM:
    return LLM(MODEL, **({"num_blocks": 48, "block_size": 4, "max_num_running": 12, "self_check": False} | options))


@pytest.fixture
def llm() -> Iterator[LLM]:
    llm = make_llm()
    yield llm
    assert_nothing_lost(llm)
    llm.close()


def assert_nothing_lost(llm: LLM) -> None:
    assert llm.engine.scheduler.manager.statistics().num_used == 0
    assert not llm.engine.has_work
    llm.engine.scheduler.check_invariants()


def tokens_of(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def quiet_tokens(prompts: list[list[int]], params: SamplingParams) -> list[tuple[int, ...]]:
    """What each prompt gets with the engine for itself."""
    with make_llm() as llm:
        return [llm.generate([prompt], params)[0].token_ids for prompt in prompts]


def patch_forward(llm: LLM, monkeypatch: pytest.MonkeyPatch, before: Callable[[StepInputs], None]) -> None:
    """Have `before` called with each step that the model is to compute."""
    forward = llm.engine.model.forward

    def patched(step: StepInputs) -> Any:
        before(step)
        return forward(step)

    monkeypatch.setattr(llm.engine.model, "forward", patched)


# Cancels


class Storm:
    """200 requests of 1 to 3 samples in an engine of too few blocks, most of which are cancelled at some time."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.prompts = [self.rng.integers(0, 160, self.rng.integers(1, 24)).tolist() for _ in range(200)]
        self.params = [
            SamplingParams(
                max_tokens=int(self.rng.integers(1, 12)),
                n=int(self.rng.integers(1, 4)),
                seed=i,
                temperature=float(i % 2),
                presence_penalty=float(i % 3 == 0),
            )
            for i in range(200)
        ]
        self.outputs: dict[str, RequestOutput] = {}

    def add(self, llm: LLM, i: int) -> None:
        token_ids, params = llm.check(self.prompts[i], self.params[i])
        llm.engine.add(str(i), token_ids, params, on_finish=self.keep, on_piece=None if i % 2 else lambda _: None)

    def keep(self, output: RequestOutput) -> None:
        assert output.request_id not in self.outputs
        self.outputs[output.request_id] = output

    def samples(self, i: int) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in self.outputs[str(i)].completions]


@pytest.mark.parametrize("swap_memory", [None, "1MiB"], ids=["recompute", "swap"])
def test_the_survivors_of_a_storm_of_cancels_have_the_tokens_of_a_quiet_run(swap_memory: str | None) -> None:
    llm = make_llm(num_blocks=24, max_num_batched_tokens=40, swap_memory=swap_memory)
    storm, quiet = Storm(3), Storm(3)
    with make_llm(num_blocks=400, max_num_running=64) as roomy:
        for i in range(200):
            quiet.add(roomy, i)
        while roomy.engine.has_work:
            roomy.engine.step()

    waiting = list(range(200))
    while waiting or llm.engine.has_work:
        for _ in range(min(len(waiting), int(storm.rng.integers(0, 6)))):
            storm.add(llm, waiting.pop(0))
        live = [str(i) for i in range(200) if llm.engine.is_live(str(i))]
        for request_id in live:
            if storm.rng.random() < 0.08:
                llm.engine.abort(request_id)
        if llm.engine.has_work:
            llm.engine.step()
        llm.engine.scheduler.check_invariants()

    survivors = [i for i in range(200) if storm.outputs[str(i)].finish_reason != "abort"]
    assert 30 <= len(survivors) <= 170
    for i in range(200):
        pairs = zip(storm.samples(i), quiet.samples(i), strict=True)
        # What a cancelled request has is the beginning of what it would have had.
        assert all(mine == whole[: len(mine)] for mine, whole in pairs), i
    for i in survivors:
        if all(completion.finish_reason != "abort" for completion in storm.outputs[str(i)].completions):
            assert storm.samples(i) == quiet.samples(i)
    assert llm.metrics().num_preemptions > 0
    assert_nothing_lost(llm)
    llm.close()


def test_a_storm_of_cancelled_tasks_leaves_the_others_alone() -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 160, rng.integers(1, 16)).tolist() for _ in range(100)]
    delays = rng.random(100) * 0.5
    is_cancelled = rng.random(100) < 0.5
    # Long enough to be under way when they are cancelled.
    params = [SamplingParams(temperature=0, max_tokens=150) if cancelled else GREEDY for cancelled in is_cancelled]
    with make_llm(num_blocks=400, max_num_running=64) as roomy:
        quiet = tokens_of(roomy.generate(prompts, GREEDY))
    llm = make_llm()

    async def read(engine: AsyncLLM, i: int) -> tuple[int, ...]:
        if i % 2:
            return (await engine.generate(prompts[i], params[i])).token_ids
        return sum([piece.token_ids async for piece in engine.stream(prompts[i], params[i])], ())

    async def main() -> list[Any]:
        async with AsyncLLM(llm) as engine:
            tasks = [asyncio.create_task(read(engine, i)) for i in range(100)]
            for i in np.flatnonzero(is_cancelled):
                asyncio.get_running_loop().call_later(delays[i], tasks[i].cancel)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            while llm.engine.has_work:
                await asyncio.sleep(0.005)
            assert_nothing_lost(llm)
            assert engine.metrics().num_failed_steps == 0
            return found

    found = asyncio.run(main())

    assert sum(isinstance(each, asyncio.CancelledError) for each in found) > 20
    survivors = np.flatnonzero(~is_cancelled)
    assert [found[i] for i in survivors] == [quiet[i] for i in survivors]


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_an_abort_ends_a_request_in_every_state(num_steps: int, preemption: str) -> None:
    # Three chunks of prompt, then decodes of two samples, while others wait, or were preempted.
    llm = make_llm(
        num_blocks=10,
        max_num_batched_tokens=8,
        max_num_running=4,
        swap_memory="1MiB" if preemption == "swap" else None,
    )
    ended: list[RequestOutput] = []
    for name in "abc":
        params = SamplingParams(temperature=0, max_tokens=9, n=2)
        prompt, _ = llm.check([ord(name)] * 17, params)
        llm.engine.add(name, prompt, params, on_finish=ended.append)
    for _ in range(3 * num_steps):
        llm.engine.step()
    for name in "abc":
        if llm.engine.is_live(name):
            llm.engine.abort(name)
            llm.engine.scheduler.check_invariants()

    assert sorted(output.request_id for output in ended) == ["a", "b", "c"]
    assert all(len(output.completions) == 2 for output in ended)
    assert_nothing_lost(llm)
    llm.close()


# Errors in sampling


def test_a_logits_processor_that_raises_ends_its_own_request(llm: LLM) -> None:
    def refuse(known: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(known) == 8:
            raise LookupError("no such token")
        return logits

    params = [GREEDY] * 6
    params[2] = SamplingParams(temperature=0, max_tokens=10, logits_processor=refuse)

    outputs = llm.generate(PROMPTS, params)

    quiet = quiet_tokens(PROMPTS, GREEDY)
    assert outputs[2].finish_reason == "error"
    assert isinstance(outputs[2].error, LookupError)
    assert outputs[2].token_ids == quiet[2][:3]
    assert [tokens for i, tokens in enumerate(tokens_of(outputs)) if i != 2] == quiet[:2] + quiet[3:]


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_logits_that_are_not_numbers_end_their_row_only(
    llm: LLM, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = llm.engine.model.forward

    def patched(step: StepInputs) -> torch.Tensor:
        logits = forward(step).clone()
        if len(logits) == 6 and int(step.positions.max()) == 7:
            logits[3] = torch.nan
        return logits

    monkeypatch.setattr(llm.engine.model, "forward", patched)
    outputs = llm.generate(PROMPTS, params)

    quiet = quiet_tokens(PROMPTS, params)
    assert isinstance(outputs[3].error, BadLogitsError)
    assert outputs[3].token_ids == quiet[3][:3]
    assert [tokens for i, tokens in enumerate(tokens_of(outputs)) if i != 3] == quiet[:3] + quiet[4:]


def test_a_stream_yields_what_came_before_its_error_and_then_raises_it(llm: LLM) -> None:
    def refuse(known: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(known) == 8:
            raise LookupError("no such token")
        return logits

    params = SamplingParams(temperature=0, max_tokens=10, logits_processor=refuse)
    tokens: list[int] = []
    with pytest.raises(LookupError, match="no such token"):
        tokens.extend(token for piece in llm.stream(PROMPTS[0], params) for token in piece.token_ids)

    assert tuple(tokens) == quiet_tokens(PROMPTS[:1], GREEDY)[0][:3]


# Errors in the model


def raise_at(token_id: int, error: BaseException, *, times: int | None = None) -> Callable[[StepInputs], None]:
    left = [times]

    def before(step: StepInputs) -> None:
        if (step.token_ids == token_id).any() and left[0] != 0:
            left[0] = None if left[0] is None else left[0] - 1
            raise error

    return before


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a kernel failed"), torch.OutOfMemoryError("no memory"), MemoryError()],
    ids=lambda e: type(e).__name__,
)
def test_a_model_that_raises_once_is_asked_again(llm: LLM, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [*PROMPTS[:3], [POISON, 7], *PROMPTS[3:]]
    patch_forward(llm, monkeypatch, raise_at(POISON, error, times=1))

    outputs = llm.generate(prompts, GREEDY)

    assert tokens_of(outputs) == quiet_tokens(prompts, GREEDY)
    assert [output.error for output in outputs] == [None] * 7
    assert llm.metrics().num_failed_steps == 1


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_a_request_for_which_the_model_always_raises_ends_and_the_others_go_on(
    llm: LLM, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*PROMPTS[:3], [POISON, 7], *PROMPTS[3:]]
    quiet = quiet_tokens(prompts, params)
    patch_forward(llm, monkeypatch, raise_at(POISON, RuntimeError("a kernel failed")))

    outputs = llm.generate(prompts, params)

    assert isinstance(outputs[3].error, ModelStepError)
    assert isinstance(outputs[3].error.__cause__, RuntimeError)
    assert outputs[3].token_ids == ()
    assert [tokens for i, tokens in enumerate(tokens_of(outputs)) if i != 3] == quiet[:3] + quiet[4:]


def test_a_request_that_the_model_refuses_in_the_middle_keeps_its_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = quiet_tokens(PROMPTS, GREEDY)
    token_id = next(
        token for token in quiet[2][3:] if all(token not in quiet[i] + tuple(PROMPTS[i]) for i in (0, 1, 3, 4, 5))
    )
    where = quiet[2].index(token_id)
    patch_forward(llm, monkeypatch, raise_at(token_id, RuntimeError("a kernel failed")))

    outputs = llm.generate(PROMPTS, GREEDY)

    assert isinstance(outputs[2].error, ModelStepError)
    assert outputs[2].token_ids == quiet[2][: where + 1]
    assert [tokens for i, tokens in enumerate(tokens_of(outputs)) if i != 2] == quiet[:2] + quiet[3:]


def test_a_batch_that_is_too_large_loses_the_request_that_came_last(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_many(step: StepInputs) -> None:
        if len(step.seq_lens) > 4:
            raise torch.OutOfMemoryError("no memory")

    patch_forward(llm, monkeypatch, refuse_many)

    outputs = llm.generate(PROMPTS, GREEDY)

    assert [type(output.error) for output in outputs] == [type(None)] * 4 + [ModelStepError] * 2
    assert tokens_of(outputs)[:4] == quiet_tokens(PROMPTS[:4], GREEDY)


def test_a_sampler_that_runs_out_of_memory_once_changes_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = llm.engine._sampler
    num_calls = 0

    class Sampler:
        def __getattr__(self, name: str) -> Any:
            return getattr(sampler, name)

        def sample(self, *arguments: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 4:
                raise torch.OutOfMemoryError("no memory")
            return sampler.sample(*arguments)

    monkeypatch.setattr(llm.engine, "_sampler", Sampler())
    params = SamplingParams(max_tokens=10, seed=1, repetition_penalty=1.3)

    assert tokens_of(llm.generate(PROMPTS, params)) == quiet_tokens(PROMPTS, params)


def test_a_sampler_that_takes_nobody_ends_who_would_be_seated_and_no_later_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "seat", refuse)
        outputs = llm.generate(PROMPTS[:3], GREEDY)

    assert [type(output.error) for output in outputs] == [ModelStepError] * 3
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == quiet_tokens(PROMPTS, GREEDY)


def test_a_model_that_fails_for_one_asynchronous_caller_serves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    quiet = quiet_tokens(PROMPTS, GREEDY)
    patch_forward(llm, monkeypatch, raise_at(POISON, RuntimeError("a kernel failed")))

    async def main() -> list[Any]:
        async with AsyncLLM(llm) as engine:
            work = [engine.generate(prompt, GREEDY) for prompt in (*PROMPTS, [POISON, 3])]
            found = await asyncio.gather(*work, return_exceptions=True)
            assert_nothing_lost(llm)
            return found

    *others, failed = asyncio.run(main())

    assert isinstance(failed, ModelStepError)
    assert tokens_of(others) == quiet


# Interrupts


def test_an_interrupt_of_the_model_leaves_the_llm_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = quiet_tokens(PROMPTS, GREEDY)
    with monkeypatch.context() as patched:
        patch_forward(llm, patched, raise_at(quiet[0][4], KeyboardInterrupt(), times=1))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
    assert_nothing_lost(llm)

    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == quiet


def test_an_interrupted_batch_leaves_a_stream_that_is_under_way_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = quiet_tokens(PROMPTS, GREEDY)
    stream = llm.stream(PROMPTS[0], GREEDY)
    tokens = list(next(stream).token_ids)
    with monkeypatch.context() as patched:
        patch_forward(llm, patched, raise_at(quiet[1][4], KeyboardInterrupt(), times=1))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[1:], GREEDY)
    tokens += [token for piece in stream for token in piece.token_ids]

    assert tuple(tokens) == quiet[0]


@pytest.fixture
def _python_handles_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_python_handles_interrupts")
@pytest.mark.parametrize("where", ["add", "schedule", "update", "abort"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_the_bookkeeping_waits_until_it_is_done(
    llm: LLM, where: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = quiet_tokens(PROMPTS, GREEDY)
    num_calls = 0
    verb = getattr(llm.engine.scheduler, where)

    def interrupted(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3 and when == "before":
            signal.raise_signal(signal.SIGINT)
        result = verb(*args)
        if num_calls == 3 and when == "after":
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patched:
        if where == "abort":  # Of the batch's requests: an interrupt while an interrupt is cleared up.
            patch_forward(llm, patched, raise_at(quiet[0][4], KeyboardInterrupt(), times=1))
        patched.setattr(llm.engine.scheduler, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
        llm.engine.scheduler.check_invariants()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == quiet


@pytest.mark.usefixtures("_python_handles_interrupts")
def test_ctrl_c_ends_a_long_computation_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = False

    def compute(_step: StepInputs) -> None:
        nonlocal is_over
        signal.raise_signal(signal.SIGINT)
        is_over = True

    with monkeypatch.context() as patched:
        patch_forward(llm, patched, compute)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)

    assert not is_over
    assert len(llm.generate(PROMPTS, GREEDY)) == 6


@pytest.mark.usefixtures("_python_handles_interrupts")
def test_a_program_that_handles_sigint_itself_goes_on_doing_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []

    def handler(number: int, _frame: object) -> None:
        received.append(number)

    signal.signal(signal.SIGINT, handler)
    with monkeypatch.context() as patched:
        patch_forward(llm, patched, lambda _: signal.raise_signal(signal.SIGINT))
        outputs = llm.generate(PROMPTS, GREEDY)

    assert received == [signal.SIGINT] * 10
    assert tokens_of(outputs) == quiet_tokens(PROMPTS, GREEDY)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_callback_that_raises_comes_out_of_step_and_takes_nobody_along(llm: LLM) -> None:
    expected = [
        output.token_ids for output in llm.generate([[1, 2, 3], [4, 5, 6]], SamplingParams(max_tokens=3, temperature=0))
    ]
    ended: list[RequestOutput] = []

    def fail(_output: RequestOutput) -> None:
        raise ZeroDivisionError("a bug of the caller")

    params = SamplingParams(max_tokens=3, temperature=0)
    llm.engine.add("a", np.array([1, 2, 3], np.int32), params, on_finish=fail)
    llm.engine.add("b", np.array([4, 5, 6], np.int32), params, on_finish=ended.append)
    llm.engine.step()
    llm.engine.step()
    with pytest.raises(ZeroDivisionError, match="a bug of the caller"):
        llm.engine.step()

    assert [output.token_ids for output in ended] == expected[1:]
