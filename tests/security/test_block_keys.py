"""S1: a block's name is a fixed function of everything that its content depends on, on every Python."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import CacheIdentity, ExtraKey, InvalidArgumentError
from pagedkv.block_keys import SCHEME, encode_extras, root_key

# Computed from the layout in block_keys.py with hashlib and struct, by a program that shares nothing with it.
LAST_KEYS = {
    "plain": "83c1806f6388e5aac8a2fb74e09fb9786c9cbc5f9dcce276e19a3f4df85171e0",
    "blocks of 3": "00b48d7f72b656bfc5bbbdde40fa0175eb10dd343b6010c85a436c3cae940b55",
    "large tokens": "5efcf3cd3e324c1fe869efd9628f596d4b41363f01a7c7516ed190015f3dd07c",
    "salt": "36733ac7f11529c1d609148008b02eb76db748dd67c0b1a5fa7450fd4c71c1fc",
    "salt of 64 bytes": "6aabe6fd785fcabcb3af6f6edf4184aebde750709c5a74eb574491e78f759b82",
    "adapter": "d4753a0e18c97d7d10237d89a9512d7c6b7dba2720fc75b92d2a5fe38e648b70",
    "empty adapter": "cf2b62f9c5d8a8be209e53075904139e48adfd04dc325d41f40b8c4542515a79",
    "model": "7316e9df10f52ae936e7d8f18c2816dadb93dce21d4c9187a72aaa020d66b0b8",
    "items": "88d04b584e6ed176fc8c0ba655a7beb4109cd5c250e9932f2797aeac71c6cf16",
    "everything": "e52bbed48e5614aeb554533ed8a84430b7cd9a8069859fd778a3539967d59f07",
}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
def test_keys_are_the_published_ones_on_every_python_and_hash_seed(run_script, version, hash_seed) -> None:
    assert json.loads(run_script("script_key_vectors.py", version=version, hash_seed=hash_seed)) == LAST_KEYS


def test_keys_are_the_published_ones_without_assertions(run_script) -> None:
    assert json.loads(run_script("script_key_vectors.py", "-O")) == LAST_KEYS


def test_the_scheme_is_version_1() -> None:
    """Another encoding is another scheme: two versions must never share a cache by accident."""
    assert SCHEME == b"pagedkv-block-key-v1"


extras = st.lists(
    st.builds(
        lambda start, length, digest: ExtraKey(start, start + length, digest),
        st.integers(0, 3),
        st.integers(1, 3),
        st.binary(min_size=1, max_size=3),
    ),
    max_size=3,
)


def inside(items: list[ExtraKey]) -> list[tuple[int, int, bytes]]:
    return [(item.start, item.stop, item.digest) for item in items if item.start < 4]


@given(extras, extras)
@settings(max_examples=300)
def test_distinct_items_have_distinct_encodings(first: list[ExtraKey], second: list[ExtraKey]) -> None:
    assert (encode_extras(first, 0, 4) == encode_extras(second, 0, 4)) == (inside(first) == inside(second))


texts = st.text(alphabet="a\0", max_size=4)
roots = st.tuples(texts, texts, st.integers(1, 3), st.binary(max_size=4), st.none() | texts)


def root(fields: tuple[str, str, int, bytes, str | None]) -> bytes:
    model, kv_dtype, block_size, salt, adapter = fields
    return root_key(CacheIdentity(model, kv_dtype), block_size, salt=salt, adapter=adapter)


@given(roots, roots)
@settings(max_examples=300)
def test_distinct_fields_have_distinct_roots(first, second) -> None:
    assert (root(first) == root(second)) == (first == second)


@given(st.binary(max_size=64))
def test_any_bytes_up_to_64_are_a_salt_at_once_and_later(salt: bytes) -> None:
    assert len(root_key(CacheIdentity(), 16, salt=salt)) == 32


@given(st.binary(min_size=65, max_size=300))
def test_more_bytes_are_refused_without_being_shown(salt: bytes) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        root_key(CacheIdentity(), 16, salt=salt)

    assert str(error.value) == f"salt must be at most 64 bytes, found {len(salt)}"


def test_a_salt_that_is_no_bytes_is_refused_by_its_type() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^salt must be bytes, at most 64 of them, found str$"):
        root_key(CacheIdentity(), 16, salt="tenant")
