"""Write every report of a run into one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagedkv.errors import InvalidArgumentError
from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.reports.page import write_page
from pagedkv.simulations.reports.perfetto import write_perfetto
from pagedkv.simulations.reports.requests_csv import write_requests
from pagedkv.simulations.reports.summary_json import write_summary
from pagedkv.simulations.run import Run

__all__ = ["write_reports"]


def write_reports(run: Run, out_dir: Path | str, summary: Mapping[str, Any] | None = None) -> dict[str, Path]:
    """Write all reports into `out_dir`, made if need be, and return their paths by what they hold.

    The keys are `summary`, `requests`, `page` and `perfetto`. Files of an earlier run are replaced, others are left
    alone. `summary` saves computing `summarize(run)` again. Same run, same bytes, except for wall-clock times.
    Raises InvalidArgumentError, with nothing written, where `out_dir` cannot be a folder because a file is in the way.
    """
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InvalidArgumentError(f"out_dir: expected a folder, found a file in the way of {folder}") from None
    figures = summarize(run) if summary is None else summary
    return {
        "summary": write_summary(run, figures, folder / "summary.json"),
        "requests": write_requests(run, folder / "requests.csv"),
        "page": write_page(run, figures, folder / "report.html"),
        "perfetto": write_perfetto(run, folder / "trace.perfetto.json"),
    }
