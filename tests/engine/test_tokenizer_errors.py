"""A tokenizer that raises on one token ends that token's request, and nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from families import make_model

from pagedkv.engine import LLM, AsyncLLM, SamplingParams

MODEL = make_model("llama")
PROMPTS = [[1 + i, 2, 3 + i, 4, 5] for i in range(3)]
GREEDY = SamplingParams(temperature=0, max_tokens=6)
TWO_SAMPLES = SamplingParams(max_tokens=6, n=2, seed=1)


class Tokenizer:
    """A letter for each token, but for the broken ones."""

    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 - nobody changes it

    def __init__(self) -> None:
        self.broken: set[int] = set()

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        if not self.broken.isdisjoint(token_ids):
            raise IndexError("piece id is out of range")
        return "".join(chr(97 + token_id % 26) for token_id in token_ids)


@pytest.fixture
def llm() -> Iterator[LLM]:
    llm = LLM(MODEL, Tokenizer(), num_blocks=48, block_size=4, max_num_running=8, self_check=False)
    yield llm
    llm.engine.scheduler.check_invariants()
    assert llm.engine.scheduler.manager.statistics().num_used == 0
    assert not llm.engine.has_work
    llm.close()


def tokens_without_errors(prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    with LLM(MODEL, num_blocks=48, block_size=4, self_check=False) as llm:
        return [output.token_ids for output in llm.generate(prompts, params)]


def own_token(tokens: list[tuple[int, ...]]) -> int:
    """A token in the midst of the second answer that no other prompt or answer has."""
    others = {*tokens[0], *tokens[2]}.union(*PROMPTS)
    return next(token for token in tokens[1][1:] if token not in others)


def test_a_token_that_the_tokenizer_refuses_ends_its_request_and_no_other(llm: LLM) -> None:
    expected = tokens_without_errors(PROMPTS)
    llm.tokenizer.broken = {own_token(expected)}

    outputs = llm.generate(PROMPTS, GREEDY)

    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert [str(output.error) for output in outputs] == ["None", "piece id is out of range", "None"]
    assert [output.token_ids for output in outputs] == expected
    assert [output.text is None for output in outputs] == [False, True, False]


def test_a_stream_ends_with_the_token_that_the_tokenizer_refuses(llm: LLM) -> None:
    expected = tokens_without_errors(PROMPTS)
    llm.tokenizer.broken = {own_token(expected)}
    tokens: list[int] = []

    with pytest.raises(IndexError, match="piece id is out of range"):
        tokens.extend(token for piece in llm.stream(PROMPTS[1], GREEDY) for token in piece.token_ids)

    assert tuple(tokens) == expected[1][: expected[1].index(own_token(expected)) + 1]


def test_the_other_samples_of_a_request_end_with_the_one_whose_text_fails(llm: LLM) -> None:
    with LLM(MODEL, num_blocks=48, block_size=4, self_check=False) as quiet:
        first, second = (sample.token_ids for sample in quiet.generate(PROMPTS[0], TWO_SAMPLES)[0].completions)
    place = next(i for i in range(1, 5) if first[i] not in {*second, *first[:i], *PROMPTS[0]})
    llm.tokenizer.broken = {first[place]}
    pieces: list[Any] = []

    with pytest.raises(IndexError):
        pieces.extend(llm.stream(PROMPTS[0], TWO_SAMPLES))

    assert [piece.finish_reason for piece in pieces[-2:]] == ["error", "error"]
    assert [sum(len(piece.token_ids) for piece in pieces if piece.index == i) for i in (0, 1)] == [place + 1] * 2


def test_a_prompt_that_the_tokenizer_refuses_ends_its_request_and_no_other(llm: LLM) -> None:
    llm.generate(PROMPTS, GREEDY)  # Rows are used by now.
    llm.tokenizer.broken = {PROMPTS[1][0]}
    prompts = [PROMPTS[1], [7, 8], [8, 9]]

    outputs = llm.generate(prompts, GREEDY)

    assert [output.finish_reason for output in outputs] == ["error", "length", "length"]
    assert isinstance(outputs[0].error, IndexError)
    assert llm.metrics().num_failed_steps == 0


def test_a_text_that_fails_at_an_abort_leaves_the_engine_usable(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    llm.tokenizer.broken = set(range(160))

    stream.close()

    llm.tokenizer.broken = set()
    assert llm.generate(PROMPTS[1], GREEDY)[0].error is None


def test_a_tokenizer_that_fails_for_one_asynchronous_caller_serves_the_others(llm: LLM) -> None:
    expected = tokens_without_errors(PROMPTS)

    async def main() -> list[Any]:
        other = LLM(MODEL, Tokenizer(), num_blocks=48, block_size=4, self_check=False)
        other.tokenizer.broken = {own_token(expected)}
        async with AsyncLLM(other) as engine:
            work = [engine.generate(prompt, GREEDY) for prompt in PROMPTS]
            return await asyncio.gather(*work, return_exceptions=True)

    first, failed, last = asyncio.run(main())

    assert isinstance(failed, IndexError)
    assert [first.token_ids, last.token_ids] == [expected[0], expected[2]]
