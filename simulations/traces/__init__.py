"""Request traces: load those of the field, describe them, generate and write your own.

>>> from pagedkv.simulations.traces import sample_trace
>>> len(sample_trace())
400
"""

from __future__ import annotations

from pagedkv.simulations.traces.formats.protocol import TRACE_FORMATS, TraceFormat
from pagedkv.simulations.traces.generator import LengthDistribution, SharedPrefixes, generate_trace
from pagedkv.simulations.traces.loading import load_trace
from pagedkv.simulations.traces.sample import sample_trace
from pagedkv.simulations.traces.trace import Trace
from pagedkv.simulations.traces.writer import write_trace

__all__ = [
    "TRACE_FORMATS",
    "LengthDistribution",
    "SharedPrefixes",
    "Trace",
    "TraceFormat",
    "generate_trace",
    "load_trace",
    "sample_trace",
    "write_trace",
]
