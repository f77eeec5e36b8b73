"""`pagedkv traces`: list, describe, convert and generate request traces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagedkv.errors import InvalidArgumentError, PagedKVError, TraceError
from pagedkv.simulations.file_errors import one_line
from pagedkv.simulations.reports.quantities import to_count, to_duration, to_rate, to_share
from pagedkv.simulations.traces.formats.protocol import TRACE_FORMATS
from pagedkv.simulations.traces.generator import LengthDistribution, SharedPrefixes, generate_trace
from pagedkv.simulations.traces.loading import load_trace, recognise_format
from pagedkv.simulations.traces.source import TraceSource
from pagedkv.simulations.traces.writer import write_trace

__all__ = ["app"]

_EXIT_BAD_INPUT: Final = 2
_SUFFIXES: Final = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")

app = typer.Typer(no_args_is_help=True, help="List, describe, convert and generate request traces.")

TracePath = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file, plain or gzip.", show_default=False)]
OutPath = Annotated[
    Path, typer.Argument(metavar="OUT", help="File to write: *.jsonl or *.jsonl.gz.", show_default=False)
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format", help=f"Read as {', '.join(f.name for f in TRACE_FORMATS)}; by default told by the content."
    ),
]
SessionGap = Annotated[
    float, typer.Option("--session-gap", help="Seconds between the starts of sessions, in a trace of sessions.")
]
Head = Annotated[int | None, typer.Option("--head", min=1, help="Take the first N requests only.", metavar="N")]


@app.command("list")
def list_traces(
    folder: Annotated[Path, typer.Argument(help="Folder to look in.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the traces in a folder: *.csv and *.jsonl files, plain or gzip, that hold a known format."""
    with _errors_on_one_line():
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(_SUFFIXES))
        found = [(path, name) for path in files if (name := _format_of(path)) is not None]
    if as_json:
        rows = [{"file": path.name, "format": name, "bytes": path.stat().st_size} for path, name in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("file", "format", "bytes")
    table.columns[2].justify = "right"
    for path, name in found:
        table.add_row(Text(path.name), name, f"{path.stat().st_size:,}")
    Console().print(table if found else "no traces found", highlight=False)


@app.command()
def describe(
    trace: TracePath,
    format_name: FormatName = None,
    session_gap: SessionGap = 0.0,
    head: Head = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print a trace's statistics: load, lengths, clients, and what an unlimited prefix cache could save."""
    with _errors_on_one_line():
        loaded = load_trace(trace, format=format_name, session_gap_s=session_gap)
        statistics = (loaded if head is None else loaded.head(head)).describe()
    if as_json:
        typer.echo(json.dumps(statistics, indent=2))
        return
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # A digest that is cut is none.
    for key, value in _flatten(statistics):
        table.add_row(key, Text(value))
    Console().print(table)


@app.command()
def convert(
    trace: TracePath,
    out: OutPath,
    format_name: FormatName = None,
    session_gap: SessionGap = 0.0,
    head: Head = None,
) -> None:
    """Write a trace of any known format as plain JSON Lines, with arrivals, lengths, clients and content ids."""
    with _errors_on_one_line():
        loaded = load_trace(trace, format=format_name, session_gap_s=session_gap)
        taken = loaded if head is None else loaded.head(head)
        digest = write_trace(taken, out)
    typer.echo(f"{out}: {len(taken)} requests, sha256 {digest}")


@app.command()
def generate(
    context: typer.Context,
    out: OutPath,
    num_requests: Annotated[int, typer.Option(help="Requests in the trace.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random generator; the same seed, the same trace.")] = 0,
    rate: Annotated[float, typer.Option(help="Requests per second, on average.")] = 1.0,
    burstiness: Annotated[float, typer.Option(help="Coefficient of variation of the gaps: 1 is Poisson.")] = 1.0,
    prompt_median: Annotated[float, typer.Option(help="Median prompt, in tokens (log-normal).")] = 512.0,
    prompt_sigma: Annotated[float, typer.Option(help="Standard deviation of the prompt's logarithm.")] = 1.0,
    prompt_max: Annotated[int, typer.Option(help="Longest prompt; longer draws become this long.")] = 8192,
    output_median: Annotated[float, typer.Option(help="Median output, in tokens (log-normal).")] = 128.0,
    output_sigma: Annotated[float, typer.Option(help="Standard deviation of the output's logarithm.")] = 0.8,
    output_max: Annotated[int, typer.Option(help="Longest output; longer draws become this long.")] = 2048,
    num_prefixes: Annotated[int, typer.Option(min=0, help="Distinct shared system prompts; 0 for none.")] = 0,
    prefix_tokens: Annotated[int, typer.Option(help="Length of each of them, added to the prompt.")] = 256,
    prefix_share: Annotated[float, typer.Option(help="Share of the requests that begin with one.")] = 1.0,
    block_size: Annotated[int, typer.Option(help="Tokens that one content id names.")] = 16,
    num_clients: Annotated[int, typer.Option(min=0, help="Clients, client k of weight 1/(k+1); 0 for none.")] = 0,
) -> None:
    """Generate a synthetic trace: Gamma arrivals, log-normal lengths, shared system prompts, several clients."""
    with _errors_on_one_line():
        if not num_prefixes:
            _refuse_without_prefixes(context)
        with _named(median="--prompt-median", sigma="--prompt-sigma", maximum="--prompt-max"):
            prompt = LengthDistribution(prompt_median, prompt_sigma, prompt_max)
        with _named(median="--output-median", sigma="--output-sigma", maximum="--output-max"):
            output = LengthDistribution(output_median, output_sigma, output_max)
        with _named(num_tokens="--prefix-tokens", share="--prefix-share"):
            prefixes = SharedPrefixes(num_prefixes, prefix_tokens, prefix_share, block_size) if num_prefixes else None
        with _named(prefixes="--prefix-tokens", path="OUT"):
            trace = generate_trace(
                num_requests,
                rng=np.random.default_rng(seed),
                rate=rate,
                burstiness=burstiness,
                prompt=prompt,
                output=output,
                prefixes=prefixes,
                num_clients=num_clients or None,
            )
            digest = write_trace(trace, out)
    typer.echo(f"{out}: {len(trace)} requests, sha256 {digest}")


def _refuse_without_prefixes(context: typer.Context) -> None:
    """Raise InvalidArgumentError for an option on the command line that nothing would come of."""
    for name in ("prefix_tokens", "prefix_share", "block_size"):
        if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            option = f"--{name.replace('_', '-')}"
            raise InvalidArgumentError(f"{option}: does nothing without --num-prefixes: give that, too")


@contextmanager
def _named(**options: str) -> Iterator[None]:
    """Tell an error of a parameter by the option that it came from: by `options`, or else by the parameter's own name."""
    try:
        yield
    except InvalidArgumentError as error:
        name, colon, rest = str(error).partition(": ")
        raise InvalidArgumentError(f"{options.get(name, '--' + name.replace('_', '-'))}{colon}{rest}") from None


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit code 2; a bug of ours keeps its traceback."""
    try:
        yield
    except (TraceError, InvalidArgumentError) as error:
        message = str(error)
    except OSError as error:
        message = one_line(error)
    else:
        return
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(_EXIT_BAD_INPUT)


def _format_of(path: Path) -> str | None:
    try:
        return recognise_format(TraceSource(path)).name
    except PagedKVError:
        return None


def _flatten(statistics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested statistics as one list, in the units that a replay's summary has."""
    for key, value in statistics.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, str):
            yield name, value
        elif key == "span_s":
            yield "span", to_duration(value)
        elif key.endswith("_ratio"):
            yield name, to_share(value)
        else:
            yield name, to_rate(value) if isinstance(value, float) else to_count(value)
