"""What the first look shows, and the chat in the terminal; both with the tiny model."""

from __future__ import annotations

import builtins
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedkv.engine import LLM, SamplingParams

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from tiny_model import model_and_tokenizer

FOLDER = Path(__file__).parents[2] / "examples"
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    torch.set_num_threads(1)
    with LLM(*model_and_tokenizer(None), num_blocks=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def chat() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "chat.py"))


def test_the_quickstart_shows_a_batch_a_stream_and_cached_prompts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--max-tokens", "6"])
    runpy.run_path(str(FOLDER / "quickstart.py"), run_name="__main__")

    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    cached = [int(number) for number in re.findall(r"prompt tokens \((\d+) cached\), 6 new", printed)]
    assert cached == [0, 0, 0, 0, 0, 1456, 1456]
    assert "24 tokens in" in printed
    assert "0 of" in printed.splitlines()[-1]


def test_the_tiny_model_says_only_letters_and_spaces(llm: LLM) -> None:
    output = llm.generate("Hello", SamplingParams(max_tokens=200, seed=1))[0]

    assert re.fullmatch(r"[a-z ]{200}", output.text or "")


def converse(
    chat: dict[str, Any], llm: LLM, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]
) -> None:
    left = iter((*lines, EOFError))

    def give(_prompt: str) -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", give)
    chat["chat"](llm, None, GREEDY)


def test_a_chat_keeps_its_history_and_the_cache_has_it(
    chat: dict[str, Any], llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "What is it that you have heard?"

    converse(chat, llm, monkeypatch, question, "", KeyboardInterrupt, "And then?")

    shown = re.findall(r"\[(\d+) prompt tokens, (\d+) of them cached\]", capsys.readouterr().out)
    # The turns' own marks are one token each: 31 + 3 of the first; then its answer of 8, and 9 + 4 of the second.
    assert shown == [("34", "0"), ("55", "32")]


def test_an_interrupt_cuts_an_answer_short_and_the_chat_goes_on(
    chat: dict[str, Any], llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = llm.engine.model.forward
    num_steps = 0

    def interrupted(step: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            raise KeyboardInterrupt
        return forward(step)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.model, "forward", interrupted)
        converse(chat, llm, patched, "one", "two")

    answers = [line for line in capsys.readouterr().out.splitlines() if re.match(r"[a-z ]", line)]
    assert re.fullmatch(r"[a-z ]{3} \[cut short\]", answers[0])
    assert re.fullmatch(r"[a-z ]{8}", answers[1])
    assert llm.engine.scheduler.manager.statistics().num_used == 0


def test_a_question_that_is_too_long_is_told_so(
    chat: dict[str, Any], llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    converse(chat, llm, monkeypatch, 9000 * "x", "short")

    printed = capsys.readouterr().out
    assert "exceed the model's 8192 positions" in printed
    assert "[8 prompt tokens, 0 of them cached]" in printed
