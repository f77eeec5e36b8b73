"""When a backend's result is right: about as exact as plain torch in the same dtype, measured against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from batches import Batch
from plain_attention import plain_attention
from random_batches import random_batch, simplest
from torch import Tensor

from pagedkv.attention import BackendUnsupportedError
from pagedkv.attention.backends import backend_named

__all__ = ["PARTITIONS", "check", "check_call", "check_random_batches", "check_refusal", "divided", "failure"]


def worst(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def check(batch: Batch, out: Tensor, lse: Tensor) -> None:
    """Raise AssertionError unless the result is about as exact as plain torch's.

    The error may be twice that of plain torch, and a floor beside it, for in a small batch plain torch may be exact by
    chance. The floor is what no kernel can avoid:
    - its result is rounded to the output's dtype, and so are its weights before they meet the values, each half a unit
      in the last place: together eps * max |out|;
    - its scores are rounded in float32, of which a dot product of up to 256 terms and an exponential each leave a few
      units: 16 * eps32 * max |score|, relative to the values;
    - numbers of a quantised cache may be rounded to the query's dtype before they meet it: eps / 2 * max |score|.
    """
    truth, truth_lse = batch.truth()
    plain, plain_lse = plain_attention(batch)
    assert out.dtype == batch.torch_dtype
    assert out.shape == truth.shape
    out, lse = out.cpu().double(), lse.cpu().double()
    is_blind = truth_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, is_blind), "an LSE is -inf where it should not be, or is not where it should"
    assert not out[is_blind].any(), "a query that sees nothing has an output other than zero"
    assert not out.isnan().any(), "NaN in the output"
    computed = torch.finfo(torch.float64 if batch.dtype == "float64" else torch.float32).eps
    # Of any score the LSE is an upper bound, and unlike scores it is at hand.
    highest = worst(truth_lse[~is_blind])
    rounding = 16 * computed * max(1.0, highest + 8 * batch.query_scale)
    if batch.cache != "float":
        rounding += torch.finfo(batch.torch_dtype).eps / 2 * max(1.0, highest)
    out_floor = torch.finfo(batch.torch_dtype).eps * worst(truth) + rounding * max(1.0, worst(truth))
    out_error, plain_error = worst(out - truth), worst(plain.double() - truth)
    assert out_error <= 2 * plain_error + out_floor, (
        f"output is off by {out_error:.3g}, plain torch by {plain_error:.3g}, floor {out_floor:.3g}"
    )
    lse_error = worst((lse - truth_lse)[~is_blind])
    plain_lse_error = worst((plain_lse.double() - truth_lse)[~is_blind])
    assert lse_error <= 2 * plain_lse_error + rounding, (
        f"LSE is off by {lse_error:.3g}, plain torch's by {plain_lse_error:.3g}, floor {rounding:.3g}"
    )


def check_call(batch: Batch, backend: str, device: str = "cpu", *, is_planned: bool = False) -> None:
    """Check what `backend` makes of `batch`; if it refuses, that it says so by name and that another one serves it."""
    plan = batch.plan(backend, device=device) if is_planned else None
    try:
        out, lse = batch.call(backend, plan=plan, device=device)
    except BackendUnsupportedError as refusal:
        check_refusal(refusal, backend)
        out, lse = batch.call(None, device=device)
    check(batch, out, lse)
    if plan is not None and plan.backend == "cpu":
        # Another call of the plan, as of the next layer, goes another way.
        again = batch.call(backend, plan=plan, device=device)
        for first, second in zip((out, lse), again, strict=True):
            torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


def check_refusal(refusal: BackendUnsupportedError, backend: str) -> None:
    """A refusal names who refuses, and what."""
    if refusal.backend != backend or not refusal.reason:
        raise AssertionError(f"asked for {backend}, and were told: {refusal}")


@contextmanager
def divided(backend: str, min_split: int | None, query_tile: int | None, has_decodes: bool) -> Iterator[None]:
    """The backend's partition with work cut finely: nearly every batch then needs splits and merges.

    None leaves the backend's own number.
    """
    owner = type(backend_named(backend))
    own = owner.partition

    def finer(*args: object) -> object:
        partition = own(*args)
        return dataclasses.replace(
            partition,
            num_workers=2,
            tasks_per_worker=6,
            min_split=min(min_split or partition.min_split, partition.min_split),
            query_tile=min(query_tile or partition.query_tile, partition.query_tile),
            max_decode_rows=partition.max_decode_rows if has_decodes else 0,
        )

    with mock.patch.object(owner, "partition", finer):
        yield


# (min_split, query_tile, has_decodes) for `divided`.
PARTITIONS = [
    (split, tile, has_decodes) for split in (None, 16, 1) for tile in (None, 3, 1) for has_decodes in (True, False)
]


def failure(check: Callable[[Batch], None], batch: Batch) -> str | None:
    """What goes wrong in `check`; None if it passes."""
    try:
        check(batch)
    except (AssertionError, ValueError, RuntimeError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def check_random_batches(check: Callable[[Batch], None], seeds: Iterable[int]) -> None:
    """Check random batches; at the first that fails, say which is the simplest that does."""
    for seed in seeds:
        batch = random_batch(seed)
        if failure(check, batch) is not None:
            simple = simplest(batch, lambda candidate: failure(check, candidate) is not None)
            raise AssertionError(f"{failure(check, simple)}\n{simple!r}\nfound as {batch!r}")
