from __future__ import annotations

import doctest
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pagedkv.simulations import metrics
from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.reports import figure, print_summary, quantities
from pagedkv.simulations.run import Run


def printed(run: Run, paths: dict[str, Path] | None = None) -> str:
    file = StringIO()
    print_summary(run, summarize(run), paths, Console(file=file, width=80))
    return file.getvalue()


def test_the_table_shows_latencies_in_fitting_units_and_fits_80_columns(run: Run) -> None:
    run.requests.admitted_s[1] = 3.532
    lines = printed(run).splitlines()
    assert max(map(len, lines)) <= 80
    words = [" ".join(line.split()) for line in lines]
    assert "queue to admission 16.0 ms 16.0 ms 28.8 ms 31.7 ms 32.0 ms" in words
    assert "TTFT to first token 1.75 s 1.75 s 2.35 s 2.48 s 2.50 s" in words


def test_the_table_shows_counts_ratios_and_reasons(run: Run) -> None:
    text = " ".join(printed(run).split())
    for shown in (
        "three 3 requests, simulated",
        "requests finished 2",
        "preemptions 1 (swaps: 1)",
        "prefix hit ratio 33.3 %",
        "KV utilisation, mean 23.3 %",
        "output tokens per second 0.500",
        "1 of 3 requests rejected: 100 prompt + 5 new tokens need 26 blocks of 4, the pool has 10",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("configuration", "shown"),
    [
        ({}, "KV memory  10 blocks"),
        ({"block_size": 4, "cost_model": {"kind": "linear"}}, "KV memory  10 blocks of 4 tokens"),
        (
            {"block_size": 4, "cost_model": {"block_size": 4, "block_bytes": 2**30, "num_devices": 2}},
            "KV memory  10 blocks of 4 tokens (10.0 GiB on each of 2 devices)",
        ),
        (
            {"block_size": 8, "cost_model": {"block_size": 4, "block_bytes": 2**30, "num_devices": 1}},
            "KV memory  10 blocks of 8 tokens",
        ),
    ],
)
def test_the_size_of_the_memory_is_shown_as_far_as_it_is_known(
    run: Run, configuration: dict[str, object], shown: str
) -> None:
    run.configuration.clear()
    run.configuration.update(configuration)

    assert shown in printed(run).splitlines()


def test_only_the_first_reasons_are_shown_and_the_others_counted(run: Run) -> None:
    run.rejections.update({index: f"reason {index}" for index in range(2, 12)})
    text = printed(run)
    assert "reason 4" in text
    assert "reason 5" not in text
    assert "and 7 more, see requests.csv" in text


def test_markup_in_names_is_text(run_maker: Callable[..., Run]) -> None:
    assert "[red]x[/red][:10]" in printed(run_maker(name="[red]x[/red][:10]"))


def test_an_empty_run_has_dashes(rejected_run: Run) -> None:
    text = printed(rejected_run)
    assert [line.split()[-5:] for line in text.splitlines() if line.startswith(" ITL")] == [["-"] * 5]
    assert "nan" not in text.lower()


def test_the_paths_are_told(run: Run) -> None:
    assert "wrote out/report.html" in printed(run, {"page": Path("out/report.html")})


@pytest.mark.parametrize("module", [figure, metrics, quantities])
def test_the_examples_in_docstrings_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0
