"""Property tests that users run against allocators and schedulers of their own: the ones that pagedkv passes itself.

Nothing is imported before it is asked for, so that tools without pytest and hypothesis can use what needs neither.
Tests need the extra: `pip install '.[testing]'` in a checkout.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedkv.testing.allocator_machine import AllocatorMachine
    from pagedkv.testing.allocator_protocol import AllocatorProtocol, Capabilities, NewSlots
    from pagedkv.testing.allocator_tests import AllocatorTests
    from pagedkv.testing.allocator_trial import AllocatorTrial
    from pagedkv.testing.allocator_verification import Report, verify
    from pagedkv.testing.event_log import EventLogChecker, EventLogSummary, check_event_log
    from pagedkv.testing.manager_allocator import ManagerAllocator
    from pagedkv.testing.reference_allocator import ReferenceAllocator
    from pagedkv.testing.scheduler_tests import SchedulerTests
    from pagedkv.testing.scheduler_zoo import KNOWN_BAD_SCHEDULERS
    from pagedkv.testing.soak.run import SoakFailedError, SoakReport, run_soak
    from pagedkv.testing.soak.settings import SoakConfig
    from pagedkv.testing.state_digest import state_digest
    from pagedkv.testing.trace_loader_tests import TraceLoaderTests

__all__ = [
    "AllocatorMachine",
    "AllocatorProtocol",
    "AllocatorTests",
    "AllocatorTrial",
    "Capabilities",
    "ManagerAllocator",
    "NewSlots",
    "ReferenceAllocator",
    "Report",
    "verify",
    "EventLogChecker",
    "EventLogSummary",
    "KNOWN_BAD_SCHEDULERS",
    "SchedulerTests",
    "SoakConfig",
    "SoakFailedError",
    "SoakReport",
    "TraceLoaderTests",
    "check_event_log",
    "run_soak",
    "state_digest",
    "strategies",
]

_MODULE_OF = {
    "AllocatorMachine": "allocator_machine",
    "AllocatorProtocol": "allocator_protocol",
    "AllocatorTests": "allocator_tests",
    "AllocatorTrial": "allocator_trial",
    "Capabilities": "allocator_protocol",
    "ManagerAllocator": "manager_allocator",
    "NewSlots": "allocator_protocol",
    "ReferenceAllocator": "reference_allocator",
    "Report": "allocator_verification",
    "verify": "allocator_verification",
    "EventLogChecker": "event_log",
    "EventLogSummary": "event_log",
    "KNOWN_BAD_SCHEDULERS": "scheduler_zoo",
    "SchedulerTests": "scheduler_tests",
    "SoakConfig": "soak.settings",
    "SoakFailedError": "soak.run",
    "SoakReport": "soak.run",
    "TraceLoaderTests": "trace_loader_tests",
    "check_event_log": "event_log",
    "run_soak": "soak.run",
    "state_digest": "state_digest",
    "strategies": "strategies",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name in ("hypothesis", "pytest"):
            raise ImportError(
                f"pagedkv.testing.{name} needs {error.name}: in a checkout of pagedkv, pip install '.[testing]'",
                name=error.name,
            ) from error
        raise
