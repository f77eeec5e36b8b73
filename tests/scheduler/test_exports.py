"""What `pagedkv.scheduler` hands out is enough to write a sink and to read what came of a step."""

from __future__ import annotations

from typing import get_args

import pytest

import pagedkv.scheduler
from pagedkv.scheduler import Event


@pytest.mark.parametrize("name", [*(kind.__name__ for kind in get_args(Event)), "Sample", "SampleState"])
def test_events_and_samples_can_be_had_from_the_package(name: str) -> None:
    assert name in pagedkv.scheduler.__all__
    assert getattr(pagedkv.scheduler, name).__name__ == name
