"""The sample that ships with the package: two minutes, three clients, most requests behind a shared prefix."""

from __future__ import annotations

from typing import Final

import numpy as np

from pagedkv.simulations.traces.generator import LengthDistribution, SharedPrefixes, generate_trace
from pagedkv.simulations.traces.loading import load_trace
from pagedkv.simulations.traces.trace import Trace

__all__ = ["SAMPLE_SEED", "generate_sample", "sample_trace"]

SAMPLE_SEED: Final = 7


def sample_trace() -> Trace:
    """Load the sample: 400 requests, 3.4 per second on average, 3 clients, 70 % behind one of 4 shared prompts."""
    from importlib import resources  # Here: it costs more to import than the sample to load.

    with resources.as_file(resources.files(__package__) / "sample.jsonl.gz") as path:
        return load_trace(path)


def generate_sample() -> Trace:
    """Draw the sample anew; a test holds it against the file. The command that writes it stands in `docs/traces.md`."""
    return generate_trace(
        400,
        rng=np.random.default_rng(SAMPLE_SEED),
        rate=3.4,
        burstiness=1.5,
        prompt=LengthDistribution(400, 1.0, 4096),
        output=LengthDistribution(120, 0.8, 1024),
        prefixes=SharedPrefixes(num_prefixes=4, num_tokens=256, share=0.7),
        num_clients=3,
        name="sample",
    )
