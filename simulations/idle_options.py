"""Options of `pagedkv replay` that nothing would come of are refused rather than ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedkv import ConfigError
from pagedkv.simulations.replay import HARDWARE_OPTIONS

__all__ = ["refuse_idle_hardware", "refuse_idle_options"]


def refuse_idle_hardware(given: Mapping[str, Any], *, has_cost_model: bool) -> None:
    """Raise ConfigError for presets that tell neither how long a step takes nor how many blocks there are.

    given: the options on the command line, as fields of ReplayConfig
    """
    idle = [f"--{name.replace('_', '-')}" for name in HARDWARE_OPTIONS if name in given]
    if idle and has_cost_model and "num_blocks" in given:
        raise ConfigError(f"{idle[0]}: --cost-model and --num-blocks say all that it would: give one of the two")


def refuse_idle_options(
    given: Mapping[str, Any], priorities: NDArray[np.float64] | None, *, can_swap: bool, prefix_caching: bool
) -> None:
    """Raise ConfigError for options on the command line that do nothing on an engine of this kind.

    priorities: of the requests; None where they have none
    """
    if "num_host_blocks" in given and not can_swap:
        raise ConfigError("--num-host-blocks: does nothing without --preemption swap or cheaper: give that, too")
    if "eviction" in given and not prefix_caching:
        raise ConfigError("--eviction: does nothing without --prefix-caching: give that, too")
    is_level = priorities is None or bool((priorities == priorities[0]).all())
    if given.get("policy") == "priority" and is_level:
        raise ConfigError("--policy priority: does nothing without requests of different priority: the trace has none")
