"""What several files of attention tests share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests are imported without a package around them; batches and plain_attention are found beside this file.
sys.path.append(str(Path(__file__).parent))

from known import CheckedError

from pagedkv.attention import op


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a call that is checked raises CheckedError."""

    def refuse(*_: object, **__: object) -> None:
        raise CheckedError

    def start() -> None:
        monkeypatch.setattr(op, "attention_features", refuse)
        monkeypatch.setattr(op, "check_write", refuse)

    return start
