"""Reports of a run: a table in the terminal, JSON, CSV, a self-contained page, and a trace for Perfetto."""

from __future__ import annotations

from pagedkv.simulations.reports.summary_json import summary_text
from pagedkv.simulations.reports.table import print_summary
from pagedkv.simulations.reports.writing import write_reports

__all__ = ["print_summary", "summary_text", "write_reports"]
