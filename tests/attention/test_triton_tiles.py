"""What the Triton backend chooses by shape, without Triton; and that importing attention does not import Triton."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from pagedkv.attention.call import Features
from pagedkv.attention.formats import CacheFormat
from pagedkv.attention.triton_kernels import TritonBackend
from pagedkv.attention.triton_kernels.tiles import Parts, Tile, decode_rows, key_parts, prefill_rows, tile_for

BF16 = Features(torch.device("cuda"), torch.bfloat16, CacheFormat.FLOAT, 16, 32, 8, 128, 128)


@pytest.mark.parametrize("cache_format", list(CacheFormat))
@pytest.mark.parametrize("head_dim", [2, 6, 16, 40, 48, 64, 80, 96, 100, 112, 128, 192, 256, 320, 512, 576, 1000, 1024])
def test_parts_hold_every_channel(head_dim: int, cache_format: CacheFormat) -> None:
    parts = key_parts(head_dim, cache_format)

    assert parts.a >= 16
    assert parts.a & (parts.a - 1) == 0
    assert parts.b & (parts.b - 1) == 0
    if cache_format is CacheFormat.INT4:
        assert parts.a == parts.b
        assert head_dim // 2 <= parts.a
    else:
        assert parts.a + parts.b >= head_dim
        assert parts.b == 0 or parts.a < head_dim


def test_a_head_of_two_powers_of_two_is_not_padded() -> None:
    assert key_parts(576, CacheFormat.FLOAT) == Parts(512, 64)
    assert key_parts(192, CacheFormat.FP8_E4M3) == Parts(128, 64)
    assert key_parts(80, CacheFormat.INT8) == Parts(64, 16)
    assert key_parts(128, CacheFormat.INT4) == Parts(64, 64)


def test_rows_of_a_task_fit_its_tiles() -> None:
    assert [decode_rows(group) for group in (1, 4, 17, 128)] == [16, 16, 32, 128]
    assert [prefill_rows(group) for group in (1, 5, 128, 130)] == [128, 125, 128, 130]


def test_the_tile_of_a_grouped_decode_is_as_small_as_the_tensor_cores_allow() -> None:
    assert tile_for(BF16, is_decode=True, is_interpreted=False).rows == 16
    assert tile_for(BF16, is_decode=False, is_interpreted=False) == Tile(128, 64, 8, 5)


def test_heads_that_are_padded_to_1024_take_fewer_rows() -> None:
    latent = dataclasses.replace(BF16, num_q_heads=128, num_kv_heads=1, head_dim=576, value_dim=512)
    in_int4 = dataclasses.replace(latent, cache_format=CacheFormat.INT4)

    for is_decode in (True, False):
        assert tile_for(latent, is_decode=is_decode, is_interpreted=False) == Tile(64, 32, 8, 3)
        assert tile_for(in_int4, is_decode=is_decode, is_interpreted=False) == Tile(32, 32, 8, 3)


def test_heads_that_fit_no_tile_are_refused_by_name() -> None:
    backend = TritonBackend()
    wide = dataclasses.replace(BF16, device=torch.device("cpu"), value_dim=1025)

    refusal = backend.refuses(wide)

    assert refusal == "heads of more than 1024 channels do not fit in shared memory, these have 1025"
    assert backend.refuses(dataclasses.replace(wide, value_dim=1024)) is None
    assert backend.refuses_write(wide) is None


def test_importing_attention_and_asking_what_runs_does_not_import_triton() -> None:
    code = (
        "import sys; from pagedkv.attention import backend_info; backend_info();"
        "from pagedkv.attention.backends import pick_for_device; import torch; pick_for_device(torch.device('cpu'));"
        "print('triton' in sys.modules)"
    )
    environment = {"TRITON_INTERPRET": "0", "PATH": "", "CUDA_VISIBLE_DEVICES": ""}

    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert run.stdout == "False\n", run.stderr
