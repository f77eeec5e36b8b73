from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.reports.page import write_page
from pagedkv.simulations.reports.table import LATENCIES
from pagedkv.simulations.run import Run

SCRIPT = "</script><script>alert(1)</script>"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ALL_FIGURES = ["utilization", "requests", "ttft", "tokens", "prefix-hits", "step-sizes", "step-durations"]


def write(run: Run, folder: Path) -> str:
    return write_page(run, summarize(run), folder / "report.html").read_text()


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return {figure["key"]: figure for figure in json.loads(found[1])}


def values_of(array: dict[str, str]) -> list[float]:
    values: list[float] = np.frombuffer(base64.b64decode(array["bdata"]), f"<{array['dtype']}").tolist()
    return values


def without_plotly(page: str) -> str:
    """The page less the longest script, which is plotly's own."""
    return page.replace(max(re.findall(r"<script>(.*?)</script>", page, re.DOTALL), key=len), "")


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._is_code = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_code = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._is_code = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._is_code else data


def test_the_page_shows_the_trace_the_configuration_and_the_figures(run: Run, tmp_path: Path) -> None:
    text = Reader(without_plotly(write(run, tmp_path))).text
    for shown in ("three", run.trace.digest, "cost_model.base_s", "simulated, not measured", "23.3 %", "2.35 s"):
        assert shown in text
    for shown in ("Rejected requests: 1", "need 26 blocks of 4", "preemptions, 1 in all", "Slowest to the first token"):
        assert shown in text


def test_every_figure_has_a_title_a_caption_and_named_axes(run: Run, tmp_path: Path) -> None:
    page = write(run, tmp_path)
    figures = figures_of(page)
    assert list(figures) == [*ALL_FIGURES, "latencies", "token-times"]
    assert page.count("<figcaption>") == page.count("<figure ") == len(figures)
    for key, figure in figures.items():
        assert f'id="plot-{key}"' in page
        axes = [axis for name, axis in figure["layout"].items() if re.match("[xy]axis", name)]
        assert len(axes) >= 2
        assert all(axis["title"]["text"] for axis in axes)


def test_the_lines_are_those_of_the_steps(run: Run, tmp_path: Path) -> None:
    figures = figures_of(write(run, tmp_path))
    (used,) = figures["utilization"]["data"]
    assert values_of(used["x"]) == [0, 1, 2, 4, 6]
    assert values_of(used["y"]) == pytest.approx([0.2, 0.2, 0, 0.5, 0.5])
    running, waiting, preempted = figures["requests"]["data"]
    assert values_of(running["y"]) == [1, 1, 0, 1, 1]
    assert values_of(waiting["y"]) == [0, 1, 0, 0, 0]
    assert (sum(values_of(preempted["y"])), preempted["name"]) == (1, "preempted, swapped out")
    decoding, prefill = figures["tokens"]["data"]
    assert values_of(decoding["y"]) == [1, 1, 0, 0.5, 0.5]
    assert values_of(prefill["y"]) == [3, 0, 0, 1.5, 1.5]
    hit, computed, _ = figures["prefix-hits"]["data"]
    assert (sum(values_of(hit["y"])), sum(values_of(computed["y"]))) == (4, 8)


def test_the_interval_before_a_gap_is_drawn(run: Run, tmp_path: Path) -> None:
    (sizes,) = figures_of(write(run, tmp_path))["step-sizes"]["data"]
    assert (values_of(sizes["x"]), sizes["line"]["shape"]) == ([0, 1, 1, 2, 2, 4, 4, 6], "linear")
    assert values_of(sizes["y"]) == pytest.approx([4, 4, 1, 1, np.nan, np.nan, 4, 4], nan_ok=True)


def test_first_tokens_by_arrival_are_nearest_ranks(run: Run, tmp_path: Path) -> None:
    median, ninetieth, slowest = figures_of(write(run, tmp_path))["ttft"]["data"]
    assert [values_of(line["y"]) for line in (median, ninetieth, slowest)] == [[1, 1], [2.5, 2.5], [2.5, 2.5]]


def test_a_long_run_is_drawn_in_fewer_points_and_the_caption_says_so(long_run: Run, tmp_path: Path) -> None:
    page = write(long_run, tmp_path)
    maximum, mean = figures_of(page)["utilization"]["data"]
    assert len(values_of(mean["y"])) == 1001
    assert values_of(mean["y"])[:2] == pytest.approx([0.375, 0.375])  # One and two blocks of four in turn.
    assert values_of(maximum["y"])[:2] == [0.5, 0.5]
    assert "both within each 6.00 ms" in page
    assert "No request was preempted" in page


def test_nothing_from_outside_can_act(run_maker: Callable[..., Run], tmp_path: Path) -> None:
    run = run_maker(name=SCRIPT)
    run.configuration[SCRIPT] = {"x": SCRIPT}
    run.configuration["model"] = '"><img src=x onerror=alert(1)>'
    run.rejections[2] = SCRIPT
    page = write(run, tmp_path)
    reader = Reader(without_plotly(page))
    assert "alert(1)</script>" not in page
    assert reader.text.count(SCRIPT) == 5  # Title, heading, name and value of a setting, reason.
    assert [tag for tag, _ in reader.tags].count("script") == 3
    assert "img" not in [tag for tag, _ in reader.tags]


def test_the_page_refers_to_nothing_outside_itself(run: Run, tmp_path: Path) -> None:
    page = without_plotly(write(run, tmp_path))
    tags = Reader(page).tags
    assert "http:" not in page
    assert "https:" not in page
    assert [attributes for _, attributes in tags if {"src", "href", "srcset", "action"} & set(attributes)] == []
    (policy,) = [
        str(a["content"]) for tag, a in tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    assert "showSendToCloud: false" in page


def test_preemptions_are_counted_in_requests_and_not_of_them(run: Run, tmp_path: Path) -> None:
    assert "Preemptions1in 1 requests, 1 by swapping" in Reader(without_plotly(write(run, tmp_path))).text


def test_requests_are_titled_by_what_is_drawn(run: Run, long_run: Run, tmp_path: Path) -> None:
    assert "<h3>Requests: running, waiting, preemptions</h3>" in write(run, tmp_path)
    assert "<h3>Requests: running</h3>" in write(long_run, tmp_path)


def test_what_is_not_defined_has_no_unit(rejected_run: Run, tmp_path: Path) -> None:
    text = Reader(without_plotly(write(rejected_run, tmp_path))).text

    assert "TTFT, median-TPOT, median-E2E, median-Output--Finished0of 1, 1 rejected" in text


def test_page_and_terminal_call_latencies_the_same(run: Run, tmp_path: Path) -> None:
    text = Reader(without_plotly(write(run, tmp_path))).text
    places = [text.index(f"{name} {meaning}") for _, name, meaning in LATENCIES]

    assert places == sorted(places)
    assert [name for _, name, _ in LATENCIES] == ["TTFT", "TPOT", "ITL", "E2E", "queue"]


def test_a_run_without_a_step_has_a_page_that_says_so(rejected_run: Run, tmp_path: Path) -> None:
    page = write(rejected_run, tmp_path)
    assert figures_of(page) == {}
    assert "nothing to draw" in page
    assert "Rejected requests: 1" in page
    assert "nan" not in Reader(without_plotly(page)).text.lower()


def test_what_did_not_happen_is_not_drawn(run: Run, tmp_path: Path) -> None:
    run.preemptions.clear()
    run.requests.num_hit[:] = 0
    run.requests.num_output[:] = 0
    figures = figures_of(write(run, tmp_path))
    assert not {"ttft", "prefix-hits"} & set(figures)
    assert len(figures["requests"]["data"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_draws_every_figure_without_complaint(run: Run, tmp_path: Path) -> None:
    figures = figures_of(write(run, tmp_path))
    result = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "report.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    page = re.sub(r"<script.*?</script>", "", result.stdout, flags=re.DOTALL)
    assert "CONSOLE" not in result.stderr
    assert page.count('class="plot-container') == len(figures)
    assert page.count('class="scatterlayer') >= len(figures)
