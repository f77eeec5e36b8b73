"""AsyncLLM: many asyncio callers, one engine thread."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from families import make_model
from tokenizers_for_tests import make_tokenizer

from pagedkv.engine import LLM, AsyncLLM, EngineClosedError, Piece, SamplingParams
from pagedkv.engine.mailbox import Mailbox
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler import RequestTooLargeError

MODEL = make_model("llama", vocab_size=267)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=400)
PROMPT = [1, 2, 3, 4, 5]


def make_llm(**options: Any) -> LLM:
    return LLM(MODEL, make_tokenizer(), **({"num_blocks": 128, "block_size": 4, "self_check": False} | options))


@pytest.fixture
def llm() -> Iterator[LLM]:
    llm = make_llm()
    yield llm
    llm.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """In an event loop, with a limit that turns a hang into a failure."""

    async def limited() -> Any:
        async with asyncio.timeout(120):
            return await work

    return asyncio.run(limited())


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


async def read_into(pieces: list[Piece], stream: AsyncIterator[Piece]) -> None:
    async for piece in stream:
        pieces.append(piece)


def num_used(llm: LLM) -> int:
    return llm.engine.scheduler.manager.statistics().num_used


def test_a_stream_has_the_tokens_and_the_text_of_a_quiet_run(llm: LLM) -> None:
    quiet = llm.generate("the thing", GREEDY)[0]

    async def main() -> list[Piece]:
        async with AsyncLLM(llm) as engine:
            return [piece async for piece in engine.stream("the thing", GREEDY)]

    pieces = run(main())

    assert sum((piece.token_ids for piece in pieces), ()) == quiet.token_ids
    assert "".join(piece.text for piece in pieces) == quiet.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_many_callers_at_once_get_what_each_gets_alone(llm: LLM) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(1, 25)]
    quiet = [output.token_ids for output in llm.generate(prompts, GREEDY)]

    async def main() -> list[tuple[int, ...]]:
        async with AsyncLLM(llm) as engine:
            outputs = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in prompts))
            return [output.token_ids for output in outputs]

    assert run(main()) == quiet


def test_a_chat_is_answered_by_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]

    async def main() -> tuple[Any, list[int]]:
        async with AsyncLLM(llm) as engine:
            return await engine.chat(messages, GREEDY), await engine.chat_prompt(messages)

    output, prompt = run(main())

    assert output.prompt_token_ids == (264, 71, 72, 263, 265) == tuple(prompt)
    assert len(output.token_ids) == 12


def test_samples_of_one_request_are_streamed_by_their_index(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, n=3, seed=5)
    quiet = [sample.token_ids for sample in llm.generate([PROMPT], params)[0].completions]

    async def main() -> dict[int, tuple[int, ...]]:
        tokens: dict[int, tuple[int, ...]] = {}
        async with AsyncLLM(llm) as engine:
            async for piece in engine.stream(PROMPT, params):
                tokens[piece.index] = tokens.get(piece.index, ()) + piece.token_ids
        return tokens

    assert run(main()) == dict(enumerate(quiet))


def test_callers_in_several_threads_have_loops_of_their_own(llm: LLM) -> None:
    quiet = llm.generate([[i, 7] for i in range(4)], GREEDY)
    found: dict[int, tuple[int, ...]] = {}
    engine = AsyncLLM(llm)

    def caller(i: int) -> None:
        found[i] = run(engine.generate([i, 7], GREEDY)).token_ids

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(engine.close())

    assert [found[i] for i in range(4)] == [output.token_ids for output in quiet]


def test_a_slow_reader_gets_merged_pieces(llm: LLM) -> None:
    quiet = llm.generate([PROMPT], GREEDY)[0]

    async def main() -> list[Piece]:
        pieces = []
        async with AsyncLLM(llm) as engine:
            async for piece in engine.stream(PROMPT, GREEDY):
                pieces.append(piece)
                await until(lambda: not llm.engine.has_work)
        return pieces

    pieces = run(main())

    assert len(pieces) <= 2
    assert sum((piece.token_ids for piece in pieces), ()) == quiet.token_ids
    assert "".join(piece.text for piece in pieces) == quiet.text
    assert pieces[-1].finish_reason == "length"


def test_a_mailbox_that_nobody_reads_merges_and_calls_into_the_loop_once() -> None:
    class Loop:
        num_calls = 0

        def call_soon_threadsafe(self, _call: Any) -> None:
            self.num_calls += 1

        def is_closed(self) -> bool:
            return False

    loop = Loop()
    mailbox = Mailbox(loop)  # type: ignore[arg-type]
    for i in range(1000):
        assert mailbox.put(Piece("a", 0, (i,), "x"))
    mailbox._arrived.set()
    pieces, end = asyncio.run(mailbox.take())

    assert loop.num_calls == 1
    assert pieces == [Piece("a", 0, tuple(range(1000)), "x" * 1000)]
    assert end is None


def test_a_reader_that_never_reads_holds_nobody_up_and_its_request_ends(llm: LLM) -> None:
    async def main() -> tuple[int, int]:
        async with AsyncLLM(llm) as engine:
            silent = engine.stream(PROMPT, LONG)
            first = await anext(silent)
            other = await engine.generate([9, 8, 7], GREEDY)
            await until(lambda: not llm.engine.has_work)
            rest = [piece async for piece in silent]
            assert len(rest) == 1
            return len(other.token_ids), len(first.token_ids) + len(rest[0].token_ids)

    assert run(main()) == (12, 400)


@pytest.mark.parametrize("way", ["task", "generator", "break", "generate"])
def test_who_goes_away_frees_the_blocks(llm: LLM, way: str) -> None:
    async def read(engine: AsyncLLM, first: asyncio.Event) -> None:
        async for _ in engine.stream(PROMPT, LONG):
            first.set()

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            if way == "generator":
                async with aclosing(engine.stream(PROMPT, LONG)) as pieces:
                    await anext(pieces)
                    assert num_used(llm) > 0
            elif way == "break":
                async for _ in engine.stream(PROMPT, LONG):
                    break
            else:
                first = asyncio.Event()
                task = asyncio.create_task(read(engine, first) if way == "task" else engine.generate(PROMPT, LONG))
                await (first.wait() if way == "task" else until(lambda: num_used(llm) > 0))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(lambda: not llm.engine.scheduler.has_work)
            assert num_used(llm) == 0
            assert engine.metrics().request_success["abort"] == 1

    run(main())


def test_a_loop_that_is_gone_has_its_requests_aborted(llm: LLM) -> None:
    engine = AsyncLLM(llm)
    loop = asyncio.new_event_loop()
    pieces = engine.stream(PROMPT, LONG)
    loop.run_until_complete(anext(pieces))
    loop.close()  # Without the clean-up that asyncio.run does.

    run(until(lambda: engine.metrics().request_success["abort"] == 1))

    assert num_used(llm) == 0
    run(engine.close())


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("prompt", "params", "kind"),
    [
        ([], GREEDY, InvalidArgumentError),
        ([500], GREEDY, InvalidArgumentError),
        (PROMPT, SamplingParams(max_tokens=1000), InvalidArgumentError),
        (PROMPT, SamplingParams(max_tokens=507), RequestTooLargeError),
        (PROMPT, SamplingParams(max_tokens=4, logprobs=300), InvalidArgumentError),
    ],
    ids=["empty", "vocabulary", "length", "memory", "logprobs"],
)
def test_what_cannot_be_done_is_refused_to_its_caller_only(
    prompt: list[int], params: SamplingParams, kind: type[Exception], streams: bool
) -> None:
    llm = make_llm(num_blocks=100)

    async def main() -> int:
        async with AsyncLLM(llm) as engine:
            with pytest.raises(kind):
                await (anext(engine.stream(prompt, params)) if streams else engine.generate(prompt, params))
            return len((await engine.generate(PROMPT, GREEDY)).token_ids)

    assert run(main()) == 12


def test_a_long_text_is_tokenized_beside_the_loop_and_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    prepare = llm.prepare

    def note(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return prepare(*arguments)

    monkeypatch.setattr(llm, "prepare", note)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            await engine.generate("a text", GREEDY)

    run(main())

    assert len(threads) == 1
    assert not threads[0].startswith(("MainThread", "pagedkv-engine"))


def test_an_idle_engine_sleeps(llm: LLM) -> None:
    async def main() -> float:
        async with AsyncLLM(llm) as engine:
            await engine.generate(PROMPT, GREEDY)
            clock = time.pthread_getcpuclockid(engine._thread.ident or 0)
            await asyncio.sleep(0.05)
            before = time.clock_gettime(clock)
            await asyncio.sleep(0.3)
            return time.clock_gettime(clock) - before

    assert run(main()) < 0.001


def test_close_ends_who_waits_and_refuses_who_comes(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        pieces = engine.stream(PROMPT, LONG)
        first = await anext(pieces)
        waiting = asyncio.create_task(engine.generate([9], LONG))
        await until(lambda: llm.engine.scheduler.num_running == 2)
        await engine.close()
        await engine.close()

        rest = [first]
        with pytest.raises(EngineClosedError, match="the engine was closed"):
            await read_into(rest, pieces)
        with pytest.raises(EngineClosedError):
            await waiting
        assert len(rest) <= 2  # What had come before the end is read all the same.
        for call in (engine.generate(PROMPT, GREEDY), engine.check(PROMPT), anext(engine.stream(PROMPT, GREEDY))):
            with pytest.raises(EngineClosedError):
                await call
        with pytest.raises(EngineClosedError):
            engine.metrics()
        assert engine.is_closed

    run(main())
    with pytest.raises(EngineClosedError):
        _ = llm.engine
    with pytest.raises(EngineClosedError):
        AsyncLLM(llm)


def test_a_dead_engine_thread_leaves_nobody_waiting(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        pieces = engine.stream(PROMPT, LONG)
        await anext(pieces)
        waiting = asyncio.create_task(engine.generate([9], LONG))
        await until(lambda: llm.engine.scheduler.num_running == 2)

        def die(*_: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(llm.engine.scheduler, "schedule", die)
        with pytest.raises(EngineClosedError, match="died of ZeroDivisionError: a bug") as caught:
            [piece async for piece in pieces]
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(EngineClosedError, match="a bug"):
            await waiting
        with pytest.raises(EngineClosedError, match="a bug"):
            await engine.generate(PROMPT, GREEDY)
        assert engine.is_closed
        await engine.close()

    run(main())


def test_a_closed_engine_holds_no_memory_for_keys_and_values_even_while_it_is_referred_to(llm: LLM) -> None:
    async def main() -> bool:
        storage = weakref.ref(llm.engine.storage)
        engine = AsyncLLM(llm)
        await engine.generate(PROMPT, GREEDY)
        await engine.close()
        return engine.is_closed and storage() is None

    assert run(main())


def test_a_check_finds_what_can_never_fit_and_only_a_request_is_counted_as_refused() -> None:
    too_long = SamplingParams(max_tokens=507)

    async def main() -> tuple[int, int]:
        async with AsyncLLM(make_llm(num_blocks=100)) as engine:
            with pytest.raises(RequestTooLargeError, match="can never run"):
                await engine.check(PROMPT, too_long)
            checked = engine.metrics().num_requests_refused
            with pytest.raises(RequestTooLargeError, match="can never run"):
                await engine.generate(PROMPT, too_long)
            return checked, engine.metrics().num_requests_refused

    assert run(main()) == (0, 1)


def test_a_closed_engine_makes_no_prompts_of_chats(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            pass
        with pytest.raises(EngineClosedError, match="the engine was closed"):
            await engine.chat_prompt([{"role": "user", "content": "Hello?"}])

    run(main())


def test_what_one_callers_argument_raises_is_that_callers_alone(llm: LLM) -> None:
    class Broken(float):
        def __abs__(self) -> float:
            raise ZeroDivisionError("a number that is none")

    async def main() -> list[Any]:
        async with AsyncLLM(llm) as engine:
            work = [engine.generate(PROMPT, GREEDY, priority=priority) for priority in (0.0, Broken(1), 0.0)]
            work.append(engine.generate(PROMPT, GREEDY, client=10**5000))
            return await asyncio.gather(*work, return_exceptions=True)

    first, broken, last, huge = run(main())

    assert first.token_ids == last.token_ids
    assert isinstance(broken, ZeroDivisionError)
    assert isinstance(huge, InvalidArgumentError)


def test_what_closing_raises_reaches_who_closes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    async def main() -> None:
        engine = AsyncLLM(llm)
        with monkeypatch.context() as patched:
            patched.setattr(llm, "close", fail)
            with pytest.raises(OSError, match="disk"):
                await engine.close()
        await engine.close()

    run(main())


def test_an_interpreter_that_forgets_to_close_ends_and_its_files_are_complete(tmp_path: Path) -> None:
    code = f"""
        import asyncio, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from families import make_model
        from pagedkv.engine import LLM, AsyncLLM, SamplingParams
        engine = AsyncLLM(LLM(make_model("llama"), num_blocks=64, block_size=4, timeline="timeline.json"))
        async def main():
            return await anext(engine.stream([1, 2, 3], SamplingParams(max_tokens=200)))
        print(len(asyncio.run(main()).token_ids) >= 1)
    """

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )

    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")
    assert (tmp_path / "timeline.json").read_text().rstrip().endswith("]")


@pytest.mark.parametrize("way", ["generate", "stream", "chat"])
def test_a_request_arrives_before_its_text_is_tokenized(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    llm = make_llm(clock=lambda: now)
    prepare = llm.prepare

    def take_five_seconds(*args: Any) -> Any:
        nonlocal now
        now += 5
        return prepare(*args)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            if way == "generate":
                await engine.generate("abc", GREEDY)
            elif way == "chat":
                await engine.chat([{"role": "user", "content": "abc"}], GREEDY)
            else:
                assert [piece async for piece in engine.stream("abc", GREEDY)]
            assert engine.metrics().time_to_first_token_seconds.total == 5.0

    monkeypatch.setattr(llm, "prepare", take_five_seconds)
    run(main())


@pytest.mark.parametrize("use", ["generate", "stream", "beam_search", "step", "close", "another"])
def test_an_llm_that_was_taken_over_refuses_all_others(llm: LLM, use: str) -> None:
    def take() -> Any:
        if use == "another":
            return AsyncLLM(llm)
        if use == "step":
            return llm.engine.step()
        if use == "close":
            return llm.close()
        return next(iter(getattr(llm, use)(PROMPT)))

    async def main() -> tuple[int, ...]:
        async with AsyncLLM(llm) as engine:
            pieces = engine.stream(PROMPT, LONG)
            tokens = (await anext(pieces)).token_ids
            with pytest.raises(EngineClosedError, match="an AsyncLLM has taken this LLM over"):
                take()
            async for piece in pieces:
                tokens += piece.token_ids
            return tokens

    assert run(main()) == make_llm().generate(PROMPT, LONG)[0].token_ids
    llm.close()


def test_an_engine_that_is_dropped_without_close_ends_and_holds_no_memory(tmp_path: Path) -> None:
    engine = AsyncLLM(make_llm(timeline=tmp_path / "timeline.json"))
    run(engine.generate(PROMPT, GREEDY))
    thread = engine._thread
    storage = weakref.ref(thread.open_llm().engine.storage)

    with pytest.warns(ResourceWarning, match="dropped without `close`"):
        del engine
    thread.join(60)

    assert not thread.is_alive()
    assert storage() is None
    assert (tmp_path / "timeline.json").read_text().rstrip().endswith("]")


def test_who_goes_away_after_the_engine_thread_died_leaves_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> int:
        engine = AsyncLLM(llm)
        pieces = [engine.stream(PROMPT, LONG) for _ in range(2)]
        for each in pieces:
            await anext(each)
        monkeypatch.setattr(llm.engine.scheduler, "schedule", None)
        await until(lambda: engine.is_closed)
        for each in pieces:
            await each.aclose()
        return len(engine._thread._commands)

    assert run(main()) == 0
