"""What a file gives back is what was saved, or one error and an untouched storage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from storage_contents import DTYPES, assert_same, contents, fail_at_line, filled, ids, raw_bytes, small_spec

from pagedkv import BlockStateError, InvalidArgumentError
from pagedkv.errors import SavedBlocksError
from pagedkv.storage import KVSpec, KVStorage, SavedBlocks, read_saved
from pagedkv.storage import files as storage_files


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_blocks_come_back_to_the_bit_in_other_blocks(tmp_path: Path, dtype: str, layout: str) -> None:
    spec = small_spec(dtype)
    storage, other = filled(spec, 4, layout=layout), KVStorage(spec, 5, layout=layout)

    storage.save_blocks(tmp_path / "a", ids(3, 0, 1), metadata={"request": "é"})
    saved = other.load_blocks(tmp_path / "a", ids(4, 0, 2))

    assert saved == SavedBlocks(num_blocks=3, num_tokens=6, metadata={"request": "é"})
    np.testing.assert_array_equal(other.read_blocks(ids(4, 0, 2)), storage.read_blocks(ids(3, 0, 1)))
    assert not other.read_blocks(ids(1, 3)).any()


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    filled(small_spec(), 1).save_blocks(path, ids(0))

    assert list(tmp_path.iterdir()) == [path]


def test_a_file_says_how_many_blocks_to_take(tmp_path: Path) -> None:
    storage = filled(small_spec(), 4)
    storage.save_blocks(tmp_path / "a", ids(3, 0), num_tokens=3, metadata={"x": ""})

    assert read_saved(tmp_path / "a", small_spec()) == SavedBlocks(2, 3, {"x": ""})


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_behind_the_last_token_are_saved_as_zeros(tmp_path: Path, dtype: str, layout: str) -> None:
    spec = small_spec(dtype, block_size=4)
    storage, other = filled(spec, 2, layout=layout), KVStorage(spec, 2, layout=layout)
    before = contents(storage)

    storage.save_blocks(tmp_path / "a", ids(0, 1), num_tokens=5)
    other.load_blocks(tmp_path / "a", ids(0, 1))

    assert_same(contents(storage), before)
    for layer in range(spec.num_layers):
        for name in ("key_cache", "value_cache", "k_scale", "v_scale"):
            own, loaded = getattr(storage, name)(layer), getattr(other, name)(layer)
            if own is not None:
                own, loaded = raw_bytes(own), raw_bytes(loaded)
                assert torch.equal(loaded[0], own[0])
                assert torch.equal(loaded[1, 0], own[1, 0])
                assert own[1, 1:].any()
                assert not loaded[1, 1:].any()


@pytest.mark.parametrize("num_tokens", [-1, 0, 2, 5, 1.0, True])
def test_tokens_and_blocks_must_agree(tmp_path: Path, num_tokens: object) -> None:
    storage = filled(small_spec(), 3)

    with pytest.raises(InvalidArgumentError, match="token"):
        storage.save_blocks(tmp_path / "a", ids(0, 1), num_tokens=num_tokens)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": "\ud800"}])
def test_metadata_is_text(tmp_path: Path, metadata: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="metadata must"):
        filled(small_spec(), 1).save_blocks(tmp_path / "a", ids(0), metadata=metadata)

    assert list(tmp_path.iterdir()) == []


def test_blocks_that_are_not_there_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(BlockStateError, match="block_ids: there is no block 3 among 3"):
        filled(small_spec(), 3).save_blocks(tmp_path / "a", ids(0, 3))

    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    storage = filled(small_spec(), 3)
    path = tmp_path / "a"
    storage.save_blocks(path, ids(0))
    old = path.read_bytes()
    num_lines = 0

    while fail_at_line(num_lines + 1, lambda: storage.save_blocks(path, ids(1, 2))):
        num_lines += 1
        assert path.read_bytes() == old or read_saved(path, small_spec()).num_blocks == 2
        for part in tmp_path.glob(".*.part"):  # A fault within the very clean-up.
            part.unlink()

    assert num_lines > 30
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        filled(small_spec(), 1).save_blocks(tmp_path / "a", ids(0))

    assert list(tmp_path.iterdir()) == []


# Files that must not be believed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two blocks, three tokens."""
    filled(small_spec(), 3).save_blocks(tmp_path / "a", ids(0, 1), num_tokens=3)
    return tmp_path / "a"


def refusal(path: Path, storage: KVStorage, block_ids: np.ndarray) -> str:
    """The message with which it is refused; the storage is untouched."""
    before = contents(storage)
    with pytest.raises(SavedBlocksError) as error:
        storage.load_blocks(path, block_ids)
    assert_same(contents(storage), before)
    return str(error.value).replace(str(path), "FILE")


def rewritten(path: Path, tensors: dict | None = None, **header: str) -> Path:
    """The same file with other tensors or header entries, its digest made anew by who knows how."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = {**file.metadata(), **header}
    content = load_file(path) if tensors is None else tensors
    if "sha256" not in header and "blocks" in content:
        found["sha256"] = storage_files._digest(found, content["blocks"])
    save_file(content, path, metadata=found)
    return path


OTHERS = [
    ("dtype", small_spec("float16"), "HND", "spec"),
    ("shape", small_spec("bfloat16", num_layers=1, num_kv_heads=4), "HND", "spec"),
    ("layout", small_spec(), "NHD", "layout"),
]


@pytest.mark.parametrize(("what", "spec", "layout", "named"), OTHERS, ids=[row[0] for row in OTHERS])
def test_a_file_of_another_shape_is_refused_though_its_blocks_are_as_large(
    saved: Path, what: str, spec: KVSpec, layout: str, named: str
) -> None:
    assert spec.bytes_per_block == small_spec().bytes_per_block

    message = refusal(saved, filled(spec, 3, layout=layout), ids(0, 1))

    assert message.startswith(f"FILE cannot be used here: its {named} is ")


@pytest.mark.parametrize("field", ["format", "byteorder"])
def test_a_file_of_another_format_is_refused(saved: Path, field: str) -> None:
    message = refusal(rewritten(saved, **{field: "other"}), filled(small_spec(), 3), ids(0, 1))

    assert message.startswith(f"FILE cannot be used here: its {field} is 'other', expected ")


def test_a_file_for_more_blocks_than_were_taken_is_refused(saved: Path) -> None:
    assert refusal(saved, filled(small_spec(), 3), ids(0)) == ("FILE holds 2 blocks, 1 were given to load it into")


@pytest.mark.parametrize("block_ids", [ids(0, 3), ids(1, 1)])
def test_blocks_to_load_into_must_be_there_and_distinct(saved: Path, block_ids: np.ndarray) -> None:
    storage = filled(small_spec(), 3)
    before = contents(storage)

    with pytest.raises(BlockStateError, match="block_ids"):
        storage.load_blocks(saved, block_ids)

    assert_same(contents(storage), before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(2, 128, dtype=torch.uint8)}, "must hold one tensor, 'blocks', found ['other']"),
        (
            {name: torch.zeros(2, 128, dtype=torch.uint8) for name in ("blocks", "more")},
            "must hold one tensor, 'blocks', found ['blocks', 'more']",
        ),
        ({"blocks": torch.zeros(2, 127, dtype=torch.uint8)}, "must hold blocks of 128 bytes, found U8 of [2, 127]"),
        ({"blocks": torch.zeros(256, dtype=torch.uint8)}, "must hold blocks of 128 bytes, found U8 of [256]"),
        ({"blocks": torch.zeros(2, 128, dtype=torch.int8)}, "must hold blocks of 128 bytes, found I8 of [2, 128]"),
        ({"blocks": torch.zeros(3, 128, dtype=torch.uint8)}, "has 3 blocks of 2 for 3 tokens"),
    ],
)
def test_a_file_with_another_tensor_is_refused(saved: Path, tensors: dict, message: str) -> None:
    assert small_spec().bytes_per_block == 128

    assert refusal(rewritten(saved, tensors), filled(small_spec(), 3), ids(0, 1)) == f"FILE {message}"


@pytest.mark.parametrize("num_tokens", ["", "-3", "3.0", "x", "٣", "9" * 5000, "5"])
def test_a_file_with_an_impossible_number_of_tokens_is_refused(saved: Path, num_tokens: str) -> None:
    assert "tokens" in refusal(rewritten(saved, num_tokens=num_tokens), filled(small_spec(), 3), ids(0, 1))


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0"], ids=["short", "long"])
def test_a_file_that_is_not_as_large_as_it_says_is_refused(saved: Path, change: Callable[[bytes], bytes]) -> None:
    saved.write_bytes(change(saved.read_bytes()))

    assert refusal(saved, filled(small_spec(), 3), ids(0, 1)).startswith("FILE is no safetensors file: ")


@pytest.mark.parametrize("digest", ["", "0" * 64])
def test_a_file_whose_digest_is_wrong_is_refused(saved: Path, digest: str) -> None:
    assert refusal(rewritten(saved, sha256=digest), filled(small_spec(), 3), ids(0, 1)) == (
        "FILE is damaged: its digest is not that of its bytes"
    )


def test_the_digest_covers_what_the_file_says_of_itself(tmp_path: Path) -> None:
    storage = filled(small_spec(), 2)
    storage.save_blocks(tmp_path / "a", ids(0), metadata={"request": "mine"})
    raw = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(raw.replace(b'"mine"', b'"your"'))

    assert "digest" in refusal(tmp_path / "a", storage, ids(1))


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"GGUF" * 100, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x80\x04\x95" + b"a" * 50]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)

    assert refusal(tmp_path / "a", filled(small_spec(), 1), ids(0)).startswith("FILE ")
    with pytest.raises(SavedBlocksError):
        read_saved(tmp_path / "a", small_spec())


def test_a_folder_is_refused_and_a_missing_file_is_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path, filled(small_spec(), 1), ids(0)) == "FILE is no file"
    with pytest.raises(FileNotFoundError):
        read_saved(tmp_path / "none", small_spec())


damages = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("append"), st.just(0.0), st.integers(1, 9)),
    st.tuples(st.just("drop"), st.floats(0, 1, exclude_max=True), st.integers(1, 40)),
)


@given(damages)
@settings(max_examples=150)
def test_a_damaged_file_is_refused_or_gives_the_very_bytes_that_were_saved(
    tmp_path_factory: pytest.TempPathFactory, damage: tuple[str, float, int]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a"
    filled(small_spec(), 3).save_blocks(path, ids(0, 1), metadata={"k": "v"})
    raw = bytearray(path.read_bytes())
    kind, place, amount = damage
    at = int(place * len(raw))
    if kind == "flip":
        raw[at] ^= amount
    elif kind == "cut":
        del raw[at:]
    elif kind == "append":
        raw += bytes(amount)
    else:
        del raw[at : at + amount]
    path.write_bytes(raw)
    storage = filled(small_spec(), 3)
    before = contents(storage)

    try:
        loaded = storage.load_blocks(path, ids(2, 1))
    except SavedBlocksError:
        assert_same(contents(storage), before)
    else:
        assert loaded == SavedBlocks(2, 4, {"k": "v"})
        np.testing.assert_array_equal(contents(storage)["device"][[2, 1]], before["device"][[0, 1]])


def test_without_safetensors_saving_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = filled(small_spec(), 2)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"saved blocks need safetensors: in a checkout of pagedkv, pip install '\.\[torch\]'"
    ):
        storage.save_blocks(tmp_path / "blocks", ids(0))
    assert not list(tmp_path.iterdir())


def test_another_module_that_is_missing_is_not_taken_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
            if fullname == "safetensors":
                raise ModuleNotFoundError("No module named 'its_own_need'", name="its_own_need")

    monkeypatch.delitem(sys.modules, "safetensors")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="its_own_need"):
        storage_files.read_saved("nowhere", small_spec())
