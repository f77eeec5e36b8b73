"""A service for simulated hours, under faults: safety while they are on, liveness once they stop.

`world` is what happens, `checkers` is what must hold; `run` puts service after service through it.
"""

from pagedkv.testing.soak.fault_points import ALLOCATION_POINTS, AllocationFaults, InjectedFailureError
from pagedkv.testing.soak.fault_sources import FaultSource, NoFaults, RandomFaults, ScriptedFaults
from pagedkv.testing.soak.run import SoakFailedError, SoakReport, run_soak
from pagedkv.testing.soak.scheduler_build import build_scheduler
from pagedkv.testing.soak.settings import Fault, FaultKind, Service, SoakConfig, draw_service
from pagedkv.testing.soak.world import World

__all__ = [
    "ALLOCATION_POINTS",
    "AllocationFaults",
    "Fault",
    "FaultKind",
    "FaultSource",
    "InjectedFailureError",
    "NoFaults",
    "RandomFaults",
    "ScriptedFaults",
    "Service",
    "SoakConfig",
    "SoakFailedError",
    "SoakReport",
    "World",
    "build_scheduler",
    "draw_service",
    "run_soak",
]
