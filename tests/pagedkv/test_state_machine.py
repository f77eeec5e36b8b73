"""The manager against an independent model, step by step: see memory_machine.py and memory_model.py."""

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from memory_machine import MemoryMachine


def test_the_manager_does_what_the_model_predicts() -> None:
    thorough = settings(
        max_examples=200,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(MemoryMachine, settings=thorough)
