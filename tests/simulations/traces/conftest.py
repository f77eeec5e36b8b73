"""Fixtures: trace files written on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pagedkv.errors import TraceError
from pagedkv.simulations.traces import Trace, load_trace

Load = Callable[..., Trace]
LoadError = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write bytes or text to a file and load it."""

    def write_and_load(content: bytes | str, **options: object) -> Trace:
        path = tmp_path / "trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return load_trace(path, **options)  # type: ignore[arg-type]

    return write_and_load


@pytest.fixture
def load_error(load: Load, tmp_path: Path) -> LoadError:
    """Write bytes or text to a file, load it, and return the error's text with the path cut to `trace`."""

    def write_and_fail(content: bytes | str, **options: object) -> str:
        with pytest.raises(TraceError) as caught:
            load(content, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{tmp_path}/trace:")
        return message.removeprefix(f"{tmp_path}/")

    return write_and_fail
