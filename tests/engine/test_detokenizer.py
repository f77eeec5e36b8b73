"""Pieces of text are final, whole characters, and together the text of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pagedkv.engine.detokenizer import Detokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice; and again.",
    "Größe, naïve café, señor — “quotes” … and more text here",
    "你好,世界。今天天气很好。我们去公园吧,再见",
    "emoji 😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 mixed with words",
    "  leading spaces, \n\n newlines\tand tabs  ",
]
SPECIAL = ["<s>", "</s>"]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])  # Special, but with no role of its own.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # noqa: S106


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen: characters may be split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    return wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral: words begin with ▁, and unknown characters fall apart into bytes."""
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for character in ["▁", *sorted(set("".join(TEXTS[:2])) - {" "}), "▁▁"]:
        vocab.setdefault(character, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Whole words that begin with ▁: the first one of a text loses its space."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL], show_progress=False)
    )
    return wrap(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: words are joined by spaces, and ## continues one."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrap(tokenizer)


BUILDERS: list[Callable[[], PreTrainedTokenizerFast]] = [byte_level, byte_fallback, metaspace, word_piece]
TOKENIZERS = {builder.__name__: builder() for builder in BUILDERS}


def decode(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def stream(detokenizer: Detokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    """Push the tokens in pieces of these sizes, over and over."""
    pieces, start = [], 0
    while start < len(token_ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.push(token_ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("sizes", [[1], [3], [1, 5, 2], [1000]], ids=str)
@pytest.mark.parametrize("prompt", ["", "A prompt: ", "Größe", "世界", "<s>", "hey<|turn|><s>"])
def test_pieces_together_are_the_text_of_all_tokens(name: str, sizes: list[int], prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    for text in TEXTS:
        output_ids = tokenizer.encode(text, add_special_tokens=False)
        whole = decode(tokenizer, prompt_ids + output_ids)
        detokenizer = Detokenizer(tokenizer, prompt_ids)

        pieces = stream(detokenizer, output_ids, sizes)

        assert decode(tokenizer, prompt_ids) + "".join(pieces) == whole
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in whole


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "word_piece"])
@settings(max_examples=150)
@given(data=st.data())
def test_any_tokens_at_all_give_the_text_of_all_tokens(name: str, data: st.DataObject) -> None:
    """Bytes that are no characters, characters cut short, special tokens anywhere."""
    tokenizer = TOKENIZERS[name]
    token_ids = st.integers(0, len(tokenizer) - 1)
    prompt_ids = tokenizer.encode("hello world", add_special_tokens=False)
    output_ids = data.draw(st.lists(token_ids, max_size=60))
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))

    pieces = stream(Detokenizer(tokenizer, prompt_ids), output_ids, sizes)

    assert decode(tokenizer, prompt_ids) + "".join(pieces) == decode(tokenizer, prompt_ids + output_ids)


def test_a_character_is_never_split() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert len(token_ids) == 6
    detokenizer = Detokenizer(tokenizer, [])

    assert [detokenizer.push([token_id]) for token_id in token_ids] == ["a", "", "", "", "😀", "b"]


def test_text_that_ends_within_a_character_is_released_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, [])

    assert detokenizer.push(tokenizer.encode("a😀", add_special_tokens=False)[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_a_character_that_the_prompt_begins_is_passed_on_whole() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("a😀b", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, token_ids[:3])

    assert detokenizer.push(token_ids[3:]) == "😀b"


@pytest.mark.parametrize("num_prompt", range(1, 12))
def test_the_first_word_keeps_its_space_after_a_prompt(num_prompt: int) -> None:
    """Wherever the prompt's tail is cut, also among the bytes of its characters."""
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt_ids = (
        tokenizer.encode("世界世界世界", add_special_tokens=False)[:1]
        + tokenizer.encode("世" * num_prompt, add_special_tokens=False)[1:]
    )

    assert Detokenizer(tokenizer, prompt_ids).push(tokenizer.encode("世 a", add_special_tokens=False)[1:]) == "世 a"


def test_a_character_after_many_broken_bytes_is_whole() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("世", add_special_tokens=False)
    for num_broken in range(30):
        detokenizer = Detokenizer(tokenizer, [])

        pieces = [detokenizer.push([token_id]) for token_id in token_ids[-1:] * num_broken + token_ids]

        assert "".join(pieces) == "\ufffd" * num_broken + "世"


def test_a_run_of_special_tokens_does_not_hide_the_prompt() -> None:
    tokenizer = TOKENIZERS["metaspace"]
    prompt_ids = tokenizer.encode("The fox" + "<|turn|>" * 12, add_special_tokens=False)
    assert len(prompt_ids) == 14

    assert Detokenizer(tokenizer, prompt_ids).push(tokenizer.encode("quick", add_special_tokens=False)) == " quick"


def test_token_ids_that_the_tokenizer_does_not_know_have_no_text() -> None:
    """Models often have more logits than their tokenizer has tokens."""
    tokenizer = TOKENIZERS["metaspace"]
    (word,) = tokenizer.encode("quick", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [])

    pieces = [detokenizer.push([token_id]) for token_id in [word, *[len(tokenizer) + 7] * 40, word]]

    assert "".join(pieces) == "quick quick"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("a</s><|turn|>b", add_special_tokens=False)

    assert Detokenizer(tokenizer, []).push(token_ids) == "ab"
    assert Detokenizer(tokenizer, [], skip_special_tokens=False).push(token_ids) == "a</s><|turn|>b"


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.all_special_ids = tokenizer.all_special_ids
        self.added_tokens_decoder = tokenizer.added_tokens_decoder
        self.num_decoded = 0

    def decode(self, token_ids: list[int], **options: bool) -> str:
        self.num_decoded += len(token_ids)
        return self.tokenizer.decode(token_ids, **options)


@pytest.mark.parametrize("output", ["words, many words", "世界", "broken", "</s>", "<|turn|>", " "])
def test_a_token_costs_the_same_however_long_the_text(output: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    broken = tokenizer.encode("世", add_special_tokens=False)[-1:]
    once = broken if output == "broken" else tokenizer.encode(output, add_special_tokens=False)
    token_ids = (once * 2000)[:2000]
    counting = CountingTokenizer(tokenizer)
    detokenizer = Detokenizer(counting, np.array(token_ids, np.int32))  # type: ignore[arg-type]

    text = "".join(detokenizer.push([token_id]) for token_id in token_ids)

    assert counting.num_decoded < 2000 * 20
    assert len(text) + 1 >= len(decode(tokenizer, token_ids))
