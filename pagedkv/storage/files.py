"""A sequence's blocks in a safetensors file: written at once or not at all, believed only after every check."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pagedkv.arrays import as_int, cdiv, shown
from pagedkv.errors import InvalidArgumentError, SavedBlocksError
from pagedkv.kv_spec import KVSpec
from pagedkv.storage.views import Layout, layer_views

__all__ = ["FORMAT", "SavedBlocks", "read_file", "read_saved", "write_file"]

FORMAT = "pagedkv blocks 2"
TENSOR = "blocks"
USER_PREFIX = "user."
MAX_METADATA_BYTES = 2**20
"""Documented cap on the caller's metadata, in UTF-8."""
MAX_HEADER_BYTES = 2**24
"""More than any header takes: JSON writes a byte of metadata as up to six."""
HEADER_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class SavedBlocks:
    """What a file of saved blocks says of itself: `metadata` is what the caller gave to `save_blocks`."""

    num_blocks: int
    num_tokens: int
    metadata: dict[str, str]


def write_file(
    path: str | os.PathLike[str],
    content: Tensor,
    *,
    spec: KVSpec,
    layout: Layout,
    num_tokens: int | None,
    metadata: dict[str, str],
) -> None:
    """Write blocks, (n, spec.bytes_per_block) uint8, which are cleared behind the last token. See `save_blocks`."""
    _need_safetensors()
    _check_metadata(metadata)
    num_blocks = len(content)
    most = num_blocks * spec.block_size
    num_tokens = most if num_tokens is None else as_int("num_tokens", num_tokens, at_least=0, at_most=most)
    if cdiv(num_tokens, spec.block_size) != num_blocks:
        raise InvalidArgumentError(
            f"{num_tokens} tokens take {cdiv(num_tokens, spec.block_size)} blocks of {spec.block_size}, found {num_blocks}"
        )
    _clear_unused(content, spec, layout, num_tokens)
    header = {
        **_identity(spec, layout),
        "num_tokens": str(num_tokens),
        **{USER_PREFIX + key: value for key, value in metadata.items()},
    }
    header["sha256"] = _digest(header, content)
    _write(Path(path), content, header)


def read_file(
    path: str | os.PathLike[str], num_blocks: int, *, spec: KVSpec, layout: Layout
) -> tuple[SavedBlocks, Tensor]:
    """Read a file of `num_blocks` blocks; everything is checked. See `load_blocks`."""
    with _opened(Path(path)) as file:
        saved, header = _checked_header(file, Path(path), spec, layout)
        if saved.num_blocks != num_blocks:
            raise SavedBlocksError(f"{path} holds {saved.num_blocks} blocks, {num_blocks} were given to load it into")
        # A copy of our own: what was checked is what is used, even if the file changes.
        content = file.get_tensor(TENSOR).clone()
    if _digest(header, content) != header.get("sha256"):
        raise SavedBlocksError(f"{path} is damaged: its digest is not that of its bytes")
    return saved, content


def read_saved(path: str | os.PathLike[str], spec: KVSpec, *, layout: Layout = "HND") -> SavedBlocks:
    """How many blocks to take for a file. Checks all but the digest. Raises SavedBlocksError or OSError. O(header)."""
    with _opened(Path(path)) as file:
        return _checked_header(file, Path(path), spec, layout)[0]


def _need_safetensors() -> None:
    """Only files need it: tensors are held and moved without."""
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            "saved blocks need safetensors: in a checkout of pagedkv, pip install '.[torch]'", name="safetensors"
        ) from None


def _identity(spec: KVSpec, layout: Layout) -> dict[str, str]:
    """What must be the same where a file is written and where it is read."""
    return {
        "format": FORMAT,
        "spec": json.dumps(asdict(spec), sort_keys=True),
        "layout": layout,
        "byteorder": sys.byteorder,
    }


def _check_metadata(metadata: Mapping[str, str]) -> None:
    num_bytes = 0
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidArgumentError(f"metadata must map strings to strings, found {shown(key)}: {shown(value)}")
        try:
            num_bytes += len((key + value).encode())
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(f"metadata must be text that UTF-8 can hold: {error}") from None
    if num_bytes > MAX_METADATA_BYTES:
        raise InvalidArgumentError(f"metadata must take at most {MAX_METADATA_BYTES} bytes, found {num_bytes}")


def _clear_unused(content: Tensor, spec: KVSpec, layout: Layout, num_tokens: int) -> None:
    num_used = num_tokens % spec.block_size
    if num_used:
        for views in layer_views(content[-1:], spec, layout):
            for view in views:
                if view is not None:
                    view[:, num_used:].zero_()


def _digest(header: Mapping[str, str], content: Tensor) -> str:
    """SHA-256 over all of the header but the digest, each text behind its length, and over all bytes."""
    digest = hashlib.sha256()
    for key in sorted(header.keys() - {"sha256"}):
        for text in (key.encode(), header[key].encode()):
            digest.update(len(text).to_bytes(8, "little") + text)
    digest.update(content.numpy().data)
    return digest.hexdigest()


def _write(path: Path, content: Tensor, header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    descriptor, name = tempfile.mkstemp(prefix=".pagedkv-", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        save_file({TENSOR: content}, part, metadata=header)
        os.fsync(descriptor)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """`safe_open`, whose refusals become SavedBlocksError: a header too long, or a file size that is not what it says.

    Its handle has no type of its own.
    """
    _need_safetensors()
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():
        raise SavedBlocksError(f"{path} is no file")
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(HEADER_LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:  # Before anybody reads as much: safetensors itself takes 100 MB.
        raise SavedBlocksError(
            f"{path} is no file of saved blocks: a header of {length} bytes, at most {MAX_HEADER_BYTES}"
        )
    try:
        handle: Any = safe_open(path, framework="pt", device="cpu")
        with handle as file:
            yield file
    except SafetensorError as error:
        raise SavedBlocksError(f"{path} is no safetensors file: {error}") from None


def _checked_header(file: Any, path: Path, spec: KVSpec, layout: Layout) -> tuple[SavedBlocks, dict[str, str]]:
    header: dict[str, str] = file.metadata() or {}
    for key, wanted in _identity(spec, layout).items():
        if header.get(key) != wanted:
            raise SavedBlocksError(
                f"{path} cannot be used here: its {key} is {shown(header.get(key))}, expected {wanted!r}"
            )
    if list(file.keys()) != [TENSOR]:
        raise SavedBlocksError(f"{path} must hold one tensor, {TENSOR!r}, found {shown(sorted(file.keys()))}")
    view = file.get_slice(TENSOR)
    shape = list(view.get_shape())
    if view.get_dtype() != "U8" or len(shape) != 2 or shape[1] != spec.bytes_per_block:
        raise SavedBlocksError(
            f"{path} must hold blocks of {spec.bytes_per_block} bytes, found {view.get_dtype()} of {shape}"
        )
    num_blocks = shape[0]
    num_tokens = header.get("num_tokens", "")
    if not (num_tokens.isascii() and num_tokens.isdecimal() and len(num_tokens) < 20):
        raise SavedBlocksError(f"{path} does not say how many tokens it holds, found {num_tokens[:20]!r}")
    if cdiv(int(num_tokens), spec.block_size) != num_blocks:
        raise SavedBlocksError(f"{path} has {num_blocks} blocks of {spec.block_size} for {num_tokens} tokens")
    user = {key.removeprefix(USER_PREFIX): value for key, value in header.items() if key.startswith(USER_PREFIX)}
    return SavedBlocks(num_blocks, int(num_tokens), user), header
