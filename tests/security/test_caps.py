"""S8: every count, length and size has a cap: one below it and the cap itself pass, one above it is refused at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv import (
    CacheConfig,
    CacheIdentity,
    ExtraKey,
    InvalidArgumentError,
    KVCacheManager,
    KVSpec,
    SavedBlocksError,
    SimulatedPrompt,
    TraceError,
)
from pagedkv.arrays import MAX_TOKENS, as_int, as_token_ids
from pagedkv.block_keys import as_extras, root_key
from pagedkv.scheduler import Cheaper, Priority, RecordingError, Request, SchedulerConfig, replay_recording
from pagedkv.simulations.run_records import read_header

NOTHING = CacheIdentity()


def adapter(length: int) -> bytes:
    return root_key(NOTHING, 16, adapter="a" * length)


def request(**fields: Any) -> Request:
    return Request(**{"request_id": "a", "prompt": [1], "max_new_tokens": 1, **fields})


def cache(**fields: int) -> CacheConfig:
    return CacheConfig(**{"num_blocks": 1, **fields})


def spec(**fields: int) -> KVSpec:
    return KVSpec(**{"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, **fields})


def scheduler(**fields: Any) -> SchedulerConfig:
    return SchedulerConfig(**{"max_num_batched_tokens": 2**24, **fields})


def content_id(value: int) -> SimulatedPrompt:
    return SimulatedPrompt(1, [value], 1)


# (what, make something of this size, cap)
CAPS: list[tuple[str, Callable[[int], object], int]] = [
    ("salt bytes", lambda n: root_key(NOTHING, 16, salt=bytes(n)), 64),
    ("adapter bytes", adapter, 4096),
    ("model bytes", lambda n: CacheIdentity("m" * n), 4096),
    ("kv_dtype bytes", lambda n: CacheIdentity("", "m" * n), 4096),
    ("item digest bytes", lambda n: ExtraKey(0, 1, bytes(n)), 64),
    ("item position", lambda n: ExtraKey(0, n, b"x"), 2**62),
    ("items", lambda n: as_extras([ExtraKey(0, 1, b"x")] * n), 1024),
    ("token id", lambda n: as_token_ids("tokens", [n]), 2**31 - 1),
    ("blocks", lambda n: cache(num_blocks=n), 2**28),
    ("host blocks", lambda n: cache(num_host_blocks=n), 2**28),
    ("block size", lambda n: cache(block_size=n), 2**16),
    ("layers", lambda n: spec(num_layers=n), 2**16),
    ("heads", lambda n: spec(num_kv_heads=n), 2**16),
    ("channels", lambda n: spec(head_dim=n), 2**16),
    ("value channels", lambda n: spec(value_dim=n), 2**16),
    ("simulated tokens", SimulatedPrompt, 2**26),
    ("content id", content_id, 2**62 - 1),
    ("tokens of a content id", lambda n: SimulatedPrompt(2, [1], n) if n > 1 else None, 2**26),
    ("characters of an id", lambda n: request(request_id="é" * n), 2**20),
    ("new tokens", lambda n: request(max_new_tokens=n), 2**26),
    ("samples", lambda n: request(n=n), 1024),
    ("stop tokens", lambda n: request(stop_token_ids=[1] * n), 1024),
    ("stop token", lambda n: request(stop_token_ids=[n]), 2**31 - 1),
    ("characters of a client", lambda n: request(client="c" * n), 4096),
    ("batched tokens", lambda n: SchedulerConfig(max_num_batched_tokens=n), 2**24),
    ("seats", lambda n: scheduler(max_num_running=n), 2**16),
    ("tokens of a chunk", lambda n: scheduler(long_prefill_tokens=n), 2**24),
    ("steps between admissions", lambda n: scheduler(admission_interval=n), 2**20),
    ("bypasses", lambda n: scheduler(max_bypasses=n), 1000),
    ("waiting samples", lambda n: scheduler(max_num_waiting=n), 2**24),
    ("preemptions", lambda n: scheduler(max_preemptions=n), 2**20),
]


@pytest.mark.parametrize(("make", "cap"), [row[1:] for row in CAPS], ids=[row[0] for row in CAPS])
def test_a_cap_is_where_it_is_documented(make: Callable[[int], object], cap: int) -> None:
    make(cap - 1)
    make(cap)
    with pytest.raises(InvalidArgumentError):
        make(cap + 1)


def test_a_prompt_has_at_most_as_many_tokens_as_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TOKENS == 2**26
    monkeypatch.setattr("pagedkv.manager.MAX_TOKENS", 8)
    manager = KVCacheManager(CacheConfig(4))
    manager.open("one less", [1] * 7)
    manager.open("most", [1] * 8)

    with pytest.raises(InvalidArgumentError, match="a prompt has 1 to 8 tokens, found 9"):
        manager.open("more", [1] * 9)
    with pytest.raises(InvalidArgumentError, match=r"tokens must be in 1\.\.8, found 9"):
        manager.extend("most", [1])
    assert len(manager) == 2


class Endless:
    """A sequence that says it is short, and never ends."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> itertools.count:
        return itertools.count()


HOSTILE: dict[str, Callable[[], object]] = {
    "a prompt as long as 2^40": lambda: KVCacheManager(CacheConfig(4)).open("a", range(2**40)),
    "items without an end": lambda: as_extras(itertools.repeat(ExtraKey(0, 1, b"x"))),
    "content ids as many as 2^40": lambda: SimulatedPrompt(16, range(2**40), 16),
    "stop tokens as many as 2^40": lambda: request(stop_token_ids=range(2**40)),
    "stop tokens as many as 2^70": lambda: request(stop_token_ids=range(2**70)),
    "tokens as many as 2^70": lambda: as_token_ids("prompt", range(2**70)),
    "an ageing beyond floats": lambda: Priority(10**400),
    "an ageing of text": lambda: Priority("fast"),
    "a cost beyond floats": lambda: Cheaper(1.0, 10**400),
    "a cost of text": lambda: Cheaper("dear", 1.0),
    "an integer of a million digits": lambda: as_int("n", 10**1_000_000, at_least=0, at_most=1),
    "a negative one": lambda: as_int("n", -(10**5000), at_least=0, at_most=1),
    "a long text for a number": lambda: as_int("n", "9" * 1_000_000, at_least=0, at_most=1),
    "a long text for an id": lambda: request(request_id="a" * (2**20 + 1)),
    "a long text for a dtype": lambda: spec(dtype="x" * 1_000_000),
    "a priority beyond floats": lambda: request(priority=10**400),
    "a watermark beyond floats": lambda: scheduler(watermark=10**400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_large_is_refused_before_memory_is_taken(name: str) -> None:
    """In a few MB at most, beyond the input itself, and with a message that a log can take."""
    make = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgumentError) as error:
            make()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 16 * 2**20
    assert len(str(error.value)) < 400


def test_no_more_is_taken_of_tokens_than_there_are_said_to_be() -> None:
    assert as_token_ids("prompt", Endless()).tolist() == [0, 1, 2]


def test_tokens_that_do_not_tell_how_many_they_are_end_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.arrays.MAX_TOKENS", 8)
    assert as_token_ids("prompt", iter(range(8))).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]

    with pytest.raises(InvalidArgumentError, match="found count: more than 8 of them"):
        as_token_ids("prompt", itertools.count())


def test_every_field_of_a_request_is_checked_when_it_is_made() -> None:
    """A value that is refused late is refused in the middle of a step."""
    wrong: dict[str, object] = {
        "request_id": 1,
        "prompt": None,
        "max_new_tokens": 1.5,
        "priority": "high",
        "client": [],
        "salt": "text",
        "adapter": b"x",
        "extras": 5,
        "stop_token_ids": 7,
        "n": True,
        "reads_cache": 1,
    }
    assert set(wrong) == {field.name for field in dataclasses.fields(Request)}

    accepted = []
    for name, value in wrong.items():
        try:
            request(**{name: value})
        except InvalidArgumentError:
            continue
        accepted.append(name)

    assert accepted == ["prompt"]  # Its tokens are checked by `add`, which copies them.


def test_metadata_of_saved_blocks_takes_at_most_a_mebibyte(tmp_path: Path) -> None:
    storage_module = pytest.importorskip("pagedkv.storage")
    storage = storage_module.KVStorage(KVSpec(1, 1, 4, block_size=2), 1)
    for num_bytes in (2**20 - 1, 2**20):
        storage.save_blocks(tmp_path / "a", np.array([0]), metadata={"k": "\0" * (num_bytes - 1)})
        assert storage.load_blocks(tmp_path / "a", np.array([0])).metadata == {"k": "\0" * (num_bytes - 1)}

    with pytest.raises(InvalidArgumentError, match="metadata must take at most 1048576 bytes, found 1048577"):
        storage.save_blocks(tmp_path / "a", np.array([0]), metadata={"k": "\0" * 2**20})


def test_a_header_of_a_hundred_megabytes_is_refused_unread(tmp_path: Path) -> None:
    storage_module = pytest.importorskip("pagedkv.storage")
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(100_000_008)

    with pytest.raises(SavedBlocksError, match="a header of 100000000 bytes, at most 16777216"):
        storage_module.read_saved(path, KVSpec(1, 1, 4, block_size=2))


def test_a_run_s_header_takes_at_most_a_mebibyte(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"[" + b" " * (2**20 - 1))
    with pytest.raises(TraceError, match="expected JSON, found something else"):
        read_header(tmp_path)
    (tmp_path / "run.json").write_bytes(b"[" + b" " * 2**20)
    with pytest.raises(TraceError, match="expected at most 1048576 bytes, found more"):
        read_header(tmp_path)


@pytest.mark.parametrize("num_blocks", [2**20 - 1, 2**20, 2**20 + 1])
def test_a_recording_s_pools_have_at_most_a_million_blocks_unless_more_are_allowed(num_blocks: int) -> None:
    header = {
        "recording": 2,
        "cache": {"num_blocks": 4, "num_host_blocks": num_blocks, "identity": {}},
        "eviction": "lru",
        "scheduler": {},
        "policy": {"name": "FCFS"},
        "victim": {"name": "LatestArrival"},
        "preemption": {"name": "Recompute"},
    }
    lines = [json.dumps(header)]
    assert list(replay_recording(lines, max_blocks=2**21)) == []

    if num_blocks <= 2**20:
        assert list(replay_recording(lines)) == []
    else:
        with pytest.raises(RecordingError, match="expected pools of at most 1048576 blocks, found more"):
            list(replay_recording(lines))


def test_a_line_of_a_recording_has_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.scheduler.replay.MAX_LINE_CHARS", 8)
    for line in (" " * 7, " " * 8):
        with pytest.raises(RecordingError, match="expected a JSON object"):
            list(replay_recording([line]))
    with pytest.raises(RecordingError, match="line 1: expected at most 8 characters, found 9"):
        list(replay_recording([" " * 9]))
