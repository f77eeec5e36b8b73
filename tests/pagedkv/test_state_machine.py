"""The manager against an independent model, step by step: see memory_machine.py."""

from types import ModuleType

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test


def test_the_manager_does_what_the_model_predicts(memory_machine: ModuleType) -> None:
    run_state_machine_as_test(
        memory_machine.MemoryMachine,
        settings=settings(
            max_examples=300,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
