import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import CacheConfig, CacheIdentity, ExtraKey, InvalidArgumentError, KVCacheManager
from pagedkv.block_keys import chain_keys, encode_extras, root_key
from pagedkv.content import TokenContent

# Computed by hand from the layout in the module's docstring, with hashlib and nothing of ours.
ROOT_OF_3 = "21c5f5d6579260924e97690aea7ec09f679af416b9d9245bc7ae572c21592185"
KEYS_OF_123456 = [
    "02b0e06781784a7e754a8ef1a3b55787291025165bb90523e30380c1657ff97a",
    "00b48d7f72b656bfc5bbbdde40fa0175eb10dd343b6010c85a436c3cae940b55",
]
ROOT_OF_3_SALT_S = "ebfb4a7d2794cdc14ce14048128119534da83e23c02ceeb79e87105d1032a342"
ROOT_OF_3_ADAPTER_S = "33567d4df667d3acbc7036baec720c3536ba01c698aa4b70bca3c85f455d1129"
ROOT_OF_ALL_FIELDS = "86bf5498aa819c7fbd2ec4588c5b53e375c7c74ec5920e54833a3173b96728a3"
KEYS_WITH_AN_ITEM = [
    "7deaed9e30d4708ceb317655b370ff6a14bb7072365660f3055c9fe16d640937",
    "538b8989e0d3abeec402005a237637642b3b1637a7f2481ba13a337d39c24490",
]


def test_root_keys_are_the_published_ones() -> None:
    nothing = CacheIdentity()
    assert root_key(nothing, 3).hex() == ROOT_OF_3
    assert root_key(nothing, 3, salt=b"s").hex() == ROOT_OF_3_SALT_S
    assert root_key(nothing, 3, adapter="s").hex() == ROOT_OF_3_ADAPTER_S
    everything = root_key(CacheIdentity("llama-é", "fp8"), 16, salt=bytes(64), adapter="")
    assert everything.hex() == ROOT_OF_ALL_FIELDS


def test_block_keys_are_the_published_ones() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6, 7], np.int32)
    content = TokenContent(tokens, 3, bytes.fromhex(ROOT_OF_3))
    assert [key.hex() for key in content.keys(2)] == KEYS_OF_123456
    assert [key.hex() for key in chain_keys(bytes.fromhex(ROOT_OF_3), tokens.tobytes(), 12)] == KEYS_OF_123456


def test_keys_of_blocks_behind_an_item_are_the_published_ones() -> None:
    tokens = np.array([7, 0, 0, 0, 0, 0, 8, 9], np.int32)
    content = TokenContent(tokens, 4, root_key(CacheIdentity(), 4), (ExtraKey(1, 6, b"img"),))
    assert [key.hex() for key in content.keys(2)] == KEYS_WITH_AN_ITEM


PRINT_KEYS = """
from pagedkv import CacheConfig, KVCacheManager
manager = KVCacheManager(CacheConfig(num_blocks=2, block_size=3))
manager.open("a", [1, 2, 3, 4, 5, 6]); manager.append("a", 6)
print(*[manager.memory.cache.key_of(block_id).hex() for block_id in (0, 1)])
"""


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_keys_do_not_depend_on_the_hash_seed_of_the_process(seed: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PRINT_KEYS], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == KEYS_OF_123456


@dataclass(frozen=True)
class Inputs:
    """Everything that a key depends on, over alphabets so small that near misses are common."""

    model: str
    kv_dtype: str
    block_size: int
    salt: bytes
    adapter: str | None
    tokens: tuple[int, ...]
    extras: tuple[tuple[int, int, bytes], ...]

    def keys(self) -> list[bytes]:
        root = root_key(CacheIdentity(self.model, self.kv_dtype), self.block_size, salt=self.salt, adapter=self.adapter)
        extras = tuple(ExtraKey(*extra) for extra in self.extras)
        content = TokenContent(np.array(self.tokens, np.int32), self.block_size, root, extras)
        return list(content.keys(len(self.tokens) // self.block_size))


texts = st.text(alphabet="a\0é", max_size=3)
binaries = st.lists(st.sampled_from((b"a", b"\0", b"\1")), max_size=3).map(b"".join)
spans = st.sampled_from(((0, 1), (0, 2), (1, 2), (1, 3), (0, 4), (2, 4)))
items = st.tuples(spans, st.sampled_from((b"a", b"b", b"\0"))).map(lambda item: (*item[0], item[1]))
inputs = st.builds(
    Inputs,
    model=texts,
    kv_dtype=texts,
    block_size=st.sampled_from((1, 2, 4)),
    salt=binaries,
    adapter=st.none() | texts,
    tokens=st.lists(st.sampled_from((0, 1, 256, 2**31 - 1)), min_size=4, max_size=4).map(tuple),
    extras=st.lists(items, max_size=2).map(sorted).map(tuple),  # Their order says nothing across blocks.
)


@given(inputs, inputs)
@settings(max_examples=400)
def test_two_inputs_have_the_same_last_key_exactly_if_they_are_equal(first: Inputs, second: Inputs) -> None:
    assert (first.keys()[-1] == second.keys()[-1]) == (first == second)


@given(inputs, st.data())
@settings(max_examples=400)
def test_changing_one_field_changes_the_last_key(one: Inputs, data: st.DataObject) -> None:
    other = data.draw(inputs)
    name = data.draw(st.sampled_from(("model", "kv_dtype", "salt", "adapter", "tokens", "extras")))
    changed = Inputs(**{**vars(one), name: getattr(other, name)})
    assert (changed.keys()[-1] == one.keys()[-1]) == (getattr(other, name) == getattr(one, name))


@given(st.lists(inputs, min_size=2, max_size=40, unique=True))
def test_no_two_blocks_of_different_sequences_share_a_key_unless_their_prefixes_are_equal(many: list[Inputs]) -> None:
    """The first block's key is shared only by inputs that agree in everything that reaches into it."""
    first_blocks = {}
    for one in many:
        inside = tuple(extra for extra in one.extras if extra[0] < one.block_size)
        meaning = (one.model, one.kv_dtype, one.block_size, one.salt, one.adapter, one.tokens[: one.block_size], inside)
        assert first_blocks.setdefault(one.keys()[0], meaning) == meaning


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_any_bytes_up_to_64_are_a_salt(first: bytes, second: bytes) -> None:
    manager = KVCacheManager(CacheConfig(num_blocks=4, block_size=1))
    manager.open("a", [1, 2], salt=first)
    manager.append("a", 2)
    assert manager.open("same", [1, 2], salt=first) == 1
    assert manager.open("other", [1, 2], salt=second) == (1 if first == second else 0)


@pytest.mark.parametrize("salt", [bytes(65), bytes(1000), "s", 1, None, bytearray(b"s")])
def test_anything_else_is_no_salt(salt: object) -> None:
    with pytest.raises(InvalidArgumentError, match="salt"):
        root_key(CacheIdentity(), 16, salt=salt)


def test_a_text_of_4096_bytes_is_an_adapter_and_one_of_4097_is_not() -> None:
    assert root_key(CacheIdentity(), 16, adapter="é" * 2048) != root_key(CacheIdentity(), 16)
    with pytest.raises(InvalidArgumentError, match="adapter must be at most 4096 bytes, found more"):
        root_key(CacheIdentity(), 16, adapter="é" * 2048 + "a")
    with pytest.raises(InvalidArgumentError, match="adapter must be a str"):
        root_key(CacheIdentity(), 16, adapter=b"x")


def test_a_lone_surrogate_is_a_text() -> None:
    assert root_key(CacheIdentity(), 16, adapter="\ud800") != root_key(CacheIdentity(), 16, adapter="\ud801")


def test_an_empty_adapter_is_not_no_adapter() -> None:
    assert root_key(CacheIdentity(), 16, adapter="") != root_key(CacheIdentity(), 16)


@pytest.mark.parametrize("field", ["model", "kv_dtype"])
@pytest.mark.parametrize("value", [None, b"x", 1, "a" * 4097])
def test_a_cache_identity_refuses_what_could_not_be_hashed_later(field: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        CacheIdentity(**{field: value})


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 0), (2, 1), (-1, 1), (0.5, 2), (0, 1.5), ("0", 2), (0, None), (0, 2**70), (2**70, 2**71), (False, True)],
)
def test_an_item_refuses_a_place_that_could_not_be_hashed_later(start: object, stop: object) -> None:
    with pytest.raises(InvalidArgumentError):
        ExtraKey(start, stop, b"x")


@pytest.mark.parametrize("item_digest", [b"", bytes(65), "x", None])
def test_an_item_refuses_a_wrong_digest(item_digest: object) -> None:
    with pytest.raises(InvalidArgumentError, match="digest"):
        ExtraKey(0, 1, item_digest)


def test_only_items_that_reach_into_a_block_are_encoded() -> None:
    extras = (ExtraKey(2, 4, b"x"),)
    assert encode_extras(extras, 0, 2) == b""
    assert encode_extras(extras, 4, 6) == b""
    assert encode_extras(extras, 2, 4) != b""


def test_an_item_is_encoded_by_its_place_relative_to_the_block() -> None:
    assert encode_extras((ExtraKey(2, 4, b"x"),), 2, 4) == encode_extras((ExtraKey(6, 8, b"x"),), 6, 8)
    assert encode_extras((ExtraKey(2, 3, b"x"),), 2, 4) != encode_extras((ExtraKey(3, 4, b"x"),), 2, 4)
