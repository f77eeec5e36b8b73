"""What a request may say of itself."""

from __future__ import annotations

from typing import Any

import pytest

from pagedkv import InvalidArgumentError
from pagedkv.scheduler import Request


@pytest.mark.parametrize(
    "client", [10**5000, -(10**5000), 2**64, "a" * 4097, 1.5, b"a"], ids=lambda c: type(c).__name__
)
def test_a_client_that_is_no_short_name_or_number_is_refused_in_one_short_line(client: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="client must be a str of at most 4096 characters") as caught:
        Request("a", [1], 1, client=client)

    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("client", [None, "", "a" * 4096, 0, 2**64 - 1, -(2**64) + 1])
def test_a_client_is_a_name_or_a_number_or_nobody(client: Any) -> None:
    assert Request("a", [1], 1, client=client).client == client
