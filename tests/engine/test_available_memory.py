"""What may still be taken is what the machine has, within the limits of the groups around the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagedkv.engine.available_memory import available_bytes

MEMINFO = {"/proc/meminfo": "MemTotal: 2000 kB\nMemAvailable:    1000 kB\n"}
NO_LIMIT_V1 = str(2**63 - 4096)


def group_v2(path: str, limit: str, taken: int, cache: int = 0) -> dict[str, str]:
    folder = f"/sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(taken),
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def group_v1(path: str, limit: str, taken: int, cache: int = 0) -> dict[str, str]:
    folder = f"/sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": str(taken),
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
    }


V2_IN_A = {"/proc/self/cgroup": "0::/a/b\n"}
V1_IN_A = {"/proc/self/cgroup": "12:cpu:/x\n4:memory:/a\n1:name=systemd:/a\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        (V2_IN_A, 1_024_000),
        (V2_IN_A | group_v2("/a/b", "max", 700_000), 1_024_000),
        (V2_IN_A | group_v2("/a/b", "900000", 700_000, cache=50_000), 250_000),
        (V2_IN_A | group_v2("/a", "500000", 400_000) | group_v2("/a/b", "900000", 200_000), 100_000),
        (V2_IN_A | group_v2("", "900000", 700_000), 200_000),
        (V2_IN_A | group_v2("/a/b", "300000", 400_000), 0),
        (V2_IN_A | group_v2("/a/b", "9000000", 0), 1_024_000),
        (V1_IN_A | group_v1("/a", "900000", 700_000, cache=50_000), 250_000),
        (V1_IN_A | group_v1("", "900000", 800_000), 100_000),
        (V1_IN_A | group_v1("/a", NO_LIMIT_V1, 700_000), 1_024_000),
    ],
)
def test_what_is_available_is_within_every_limit(
    files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = MEMINFO | files

    def read(path: Path, *_: Any, **__: Any) -> str:
        if str(path) not in there:
            raise FileNotFoundError(path)
        return there[str(path)]

    monkeypatch.setattr(Path, "read_text", read)

    assert available_bytes() == expected
