"""How much of a data sheet's peak numbers a real engine gets."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.simulations.cost_models.checks import require_fraction, require_non_negative

__all__ = ["IDEAL", "TYPICAL", "Efficiency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Fractions of peak, and fixed costs. The defaults are assumptions, set from published ranges; see below.

    compute:      achieved / peak dense FLOP/s of large matrix products. 0.6: between the 0.38 to 0.43 of training
                  Llama 3 with all communication counted (Grattafiori et al. 2024, arXiv:2407.21783, table 4) and
                  the 0.76 of PaLM prefill at its best (Pope et al. 2022, arXiv:2211.05102, abstract).
    memory:       achieved / peak memory bandwidth. 0.8, an assumption: long copies come closer, many short
                  kernels do not.
    device_link:  achieved / peak bandwidth of large ring all-reduces. 0.8: NCCL's authors count 20 % of protocol
                  overhead, 370 of 450 GB/s on H100 (github.com/NVIDIA/nccl-tests, thread 212).
    host_link:    achieved / peak bandwidth of pinned copies over PCIe. 0.8: 25 of 32 GB/s were measured on an A100
                  (Qureshi et al. 2022, BaM, arXiv:2203.04910).
    step_overhead_s:      launching and scheduling that no device work hides, for each step. 0.5 ms, an assumption.
    all_reduce_latency_s: fixed time of one all-reduce, which rules when few tokens are decoded. 10 us, an assumption:
                  with graphs NCCL needs 6 us on two H100 (github.com/NVIDIA/nccl, thread 1259), more on eight.

    Fractions must be above 0 and at most 1, times finite and at least 0: `ConfigError` otherwise.
    """

    compute: float = 0.6
    memory: float = 0.8
    device_link: float = 0.8
    host_link: float = 0.8
    step_overhead_s: float = 0.5e-3
    all_reduce_latency_s: float = 10e-6

    def __post_init__(self) -> None:
        for name in ("compute", "memory", "device_link", "host_link"):
            require_fraction(name, getattr(self, name))
        for name in ("step_overhead_s", "all_reduce_latency_s"):
            require_non_negative(name, getattr(self, name))


TYPICAL = Efficiency()
"""The defaults: what a well-tuned engine may be expected to reach."""

IDEAL = Efficiency(
    compute=1.0, memory=1.0, device_link=1.0, host_link=1.0, step_overhead_s=0.0, all_reduce_latency_s=0.0
)
"""The pure roofline: every peak reached, nothing fixed. No step can be faster than this."""
