"""A timeline or a record that cannot be written ends alone: serving goes on, and closing tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import make_model

from pagedkv.engine import LLM, AsyncLLM, NgramDrafter, RequestOutput, SamplingParams
from pagedkv.engine.run_record import RunRecorder
from pagedkv.engine.timeline import Timeline
from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.scheduler.events import Added, Admitted

MODEL = make_model("llama")
PROMPT = [1, 2, 3, 4, 5]
GREEDY = SamplingParams(temperature=0, max_tokens=3)


def make_llm(**options: Any) -> LLM:
    return LLM(MODEL, num_blocks=16, block_size=4, self_check=False, **options)


def quiet_tokens() -> tuple[int, ...]:
    with make_llm() as llm:
        return llm.generate(PROMPT, GREEDY)[0].token_ids


def fill_disk(*_arguments: Any, **_more: Any) -> None:
    raise OSError(28, "No space left on device")


def at_event(kind: type) -> Callable[[pytest.MonkeyPatch], None]:
    def break_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
        emit = Timeline.emit
        monkeypatch.setattr(
            Timeline, "emit", lambda self, event: (fill_disk if type(event) is kind else emit)(self, event)
        )

    return break_timeline


def at_call(observer: type, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(observer, name, fill_disk)


BROKEN = {
    "timeline as a request is added": at_event(Added),
    "timeline as a step is planned": at_event(Admitted),
    "timeline when a step was planned": at_call(Timeline, "on_schedule"),
    "timeline when a step was carried out": at_call(Timeline, "on_step"),
    "timeline at the end": at_call(Timeline, "close"),
    "record as a request is added": at_call(RunRecorder, "on_request"),
    "record when a step was carried out": at_call(RunRecorder, "on_step"),
    "record when a sample has ended": at_call(RunRecorder, "on_finish"),
    "record at the end": at_call(RunRecorder, "close"),
}


@pytest.mark.parametrize("where", BROKEN)
def test_a_full_disk_stops_no_request_and_closing_raises_it_once(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llm = make_llm(timeline=tmp_path / "timeline.json", record=tmp_path / "run")
    BROKEN[where](monkeypatch)

    outputs = [llm.generate(PROMPT, GREEDY)[0].token_ids for _ in range(2)]
    llm.engine.scheduler.check_invariants()
    with pytest.raises(OSError, match="No space left"):
        llm.close()
    llm.close()

    assert outputs == [quiet_tokens()] * 2


def test_two_files_that_cannot_be_written_are_both_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llm = make_llm(timeline=tmp_path / "timeline.json", record=tmp_path / "run")
    at_call(Timeline, "on_step")(monkeypatch)
    at_call(RunRecorder, "on_step")(monkeypatch)
    llm.generate(PROMPT, GREEDY)

    with pytest.raises(ExceptionGroup) as caught:
        llm.close()

    assert [type(error) for error in caught.value.exceptions] == [OSError, OSError]


def test_asynchronous_callers_do_not_notice_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_event(Added)(monkeypatch)

    async def main() -> list[RequestOutput]:
        engine = AsyncLLM(make_llm(timeline=tmp_path / "timeline.json"))
        outputs = [await engine.generate(PROMPT, GREEDY) for _ in range(2)]
        with pytest.raises(OSError, match="No space left"):
            await engine.close()
        return outputs

    assert [output.token_ids for output in asyncio.run(main())] == [quiet_tokens()] * 2


def test_a_clock_that_stands_still_can_be_recorded(tmp_path: Path) -> None:
    with make_llm(record=tmp_path / "run", timeline=tmp_path / "timeline.json", clock=lambda: 5.0) as llm:
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == quiet_tokens()

    assert len((tmp_path / "run" / "steps.csv").read_text().splitlines()) == 4


class NoGuesses(NgramDrafter):
    """Fits no model."""

    def check_target(self, vocab_size: int) -> None:
        raise ConfigError(f"not {vocab_size}")


def test_a_construction_that_fails_leaves_no_record_and_an_old_timeline_as_it_was(tmp_path: Path) -> None:
    record, timeline = tmp_path / "run", tmp_path / "timeline.json"
    timeline.write_text("of an earlier run")

    with pytest.raises(ConfigError, match="not "):
        make_llm(drafter=NoGuesses(), record=record, timeline=timeline)
    assert not record.exists()
    with pytest.raises(FileNotFoundError):
        make_llm(record=record, timeline=tmp_path / "nowhere" / "timeline.json")
    assert not record.exists()
    make_llm(record=record).close()
    with pytest.raises(InvalidArgumentError, match="holds a recorded run already"):
        make_llm(record=record, timeline=timeline)

    assert timeline.read_text() == "of an earlier run"
