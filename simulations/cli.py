"""The `pagedkv` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pagedkv import ConfigError, PagedKVError, __version__
from pagedkv.scheduler import EventLog, EventSink
from pagedkv.simulations.cost_models import DEVICES, MODELS, load_cost_model
from pagedkv.simulations.file_errors import make_folder, one_line
from pagedkv.simulations.progress import progress_bar

if TYPE_CHECKING:
    from pagedkv.simulations.replay import ReplayConfig, StepCosts

__all__ = ["app", "main"]

USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
"""What typer raises for a wrong option, a missing argument and the like: it has no public name for all of these."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Replay LLM request traces through the scheduler and KV-cache manager that engines embed. No GPU needed.",
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"pagedkv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


REPLAY_HELP = (
    "Replay a request trace; print a summary and write a report.\n\n"
    "Writes summary.json, requests.csv, report.html (self-contained) and a Perfetto trace. "
    "Same trace and options, same figures, byte for byte, apart from wall-clock times.\n\n"
    "TRACE may be the folder of a recorded run: it is replayed with the options that it was recorded with, but for those "
    "given here, on step times fitted to it, and compared with what was measured."
)


@app.command(help=REPLAY_HELP)
def replay(
    context: typer.Context,
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="Request trace, gzip or not; its format is recognised by content. Or a recorded run, a folder. "
            "Default: a small sample."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report files.")] = Path("pagedkv-report"),
    model: Annotated[
        str, typer.Option(help=f"Model preset: {', '.join(MODELS)}.", rich_help_panel="Hardware")
    ] = "Llama-3-8B",
    device: Annotated[
        str, typer.Option(help=f"Device preset: {', '.join(DEVICES)}.", rich_help_panel="Hardware")
    ] = "H100",
    num_devices: Annotated[
        int, typer.Option(help="Devices that share the model (tensor parallel).", rich_help_panel="Hardware")
    ] = 1,
    weight_bits: Annotated[
        int, typer.Option(help="Bits of a weight: 4, 8, 16 or 32.", rich_help_panel="Hardware")
    ] = 16,
    kv_bits: Annotated[
        int, typer.Option(help="Bits of a K/V element: 4, 8, 16 or 32.", rich_help_panel="Hardware")
    ] = 16,
    cost_model: Annotated[
        Path | None,
        typer.Option(
            help="Step times that `pagedkv fit` has learnt, instead of the presets'.", rich_help_panel="Hardware"
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Tokens per block. Default: the trace's own, else 16.", rich_help_panel="Memory"),
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(help="Blocks on the device. Default: what fits.", rich_help_panel="Memory")
    ] = None,
    num_host_blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks for swapping. Default: as on the device if preemption swaps.", rich_help_panel="Memory"
        ),
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Whether full blocks are kept for reuse.", rich_help_panel="Memory")
    ] = True,
    eviction: Annotated[str, typer.Option(help="lru, fifo, s3-fifo or sieve.", rich_help_panel="Memory")] = "lru",
    policy: Annotated[
        str, typer.Option(help="fcfs or priority, of which the trace must tell.", rich_help_panel="Scheduling")
    ] = "fcfs",
    preemption: Annotated[
        str, typer.Option(help="recompute, swap or cheaper.", rich_help_panel="Scheduling")
    ] = "recompute",
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step.", rich_help_panel="Scheduling")
    ] = 8192,
    max_num_running: Annotated[int, typer.Option(help="Seats.", rich_help_panel="Scheduling")] = 256,
    long_prefill_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of one prompt in a step while others are computed or wait.", rich_help_panel="Scheduling"
        ),
    ] = None,
    admission_interval: Annotated[
        int,
        typer.Option(
            help="Steps from one that admits requests to the next that may, while any run: others decode undisturbed.",
            rich_help_panel="Scheduling",
        ),
    ] = 1,
    chunked_prefill: Annotated[
        bool, typer.Option(help="Whether a prompt may be computed over several steps.", rich_help_panel="Scheduling")
    ] = True,
    watermark: Annotated[
        float, typer.Option(help="Share of blocks that an admission leaves available.", rich_help_panel="Scheduling")
    ] = 0.01,
    max_bypasses: Annotated[
        int, typer.Option(help="How often a request that does not fit may be passed.", rich_help_panel="Scheduling")
    ] = 4,
    max_preemptions: Annotated[
        int, typer.Option(help="How often a request may lose its seat.", rich_help_panel="Scheduling")
    ] = 8,
    client_share: Annotated[
        float | None,
        typer.Option(
            help="Share of seats and blocks that one client's requests may take.", rich_help_panel="Scheduling"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Replay only the first N requests.", metavar="N", min=1)] = None,
    rate_scale: Annotated[float, typer.Option(help="2 lets requests arrive twice as fast.")] = 1.0,
    session_gap: Annotated[
        float, typer.Option(help="Seconds between the starts of sessions, for traces of sessions.")
    ] = 0.0,
    events: Annotated[
        Path | None, typer.Option(help="Write every decision of the scheduler to this file, as JSON lines.")
    ] = None,
    leaps: Annotated[bool, typer.Option(help="Take runs of identical decode steps at once; same outcome.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Recount every invariant now and then; slower.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of a table.")] = False,
) -> None:
    """Replay a request trace; print a summary and write a report."""
    from pagedkv.simulations.idle_options import refuse_idle_hardware, refuse_idle_options
    from pagedkv.simulations.metrics import summarize
    from pagedkv.simulations.replay import ReplayConfig
    from pagedkv.simulations.replay import replay as run_replay
    from pagedkv.simulations.reports import print_summary, summary_text, write_reports
    from pagedkv.simulations.traces import load_trace, sample_trace

    config = ReplayConfig(
        model=model,
        device=device,
        num_devices=num_devices,
        weight_bits=weight_bits,
        kv_bits=kv_bits,
        block_size=block_size,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        prefix_caching=prefix_caching,
        eviction=eviction,
        policy=policy,
        preemption=preemption,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_running=max_num_running,
        long_prefill_tokens=long_prefill_tokens,
        admission_interval=admission_interval,
        chunked_prefill=chunked_prefill,
        watermark=watermark,
        max_bypasses=max_bypasses,
        max_preemptions=max_preemptions,
        client_share=client_share,
        rate_scale=rate_scale,
        leaps=leaps,
        checks=check,
    )
    costs = None if cost_model is None else load_cost_model(cost_model)
    if trace is not None and trace.is_dir():
        if limit is not None or session_gap:
            raise ConfigError(f"a recorded run is replayed whole: for a part, replay {trace / 'trace.jsonl'}")
        _replay_recorded(trace, _given(context, config), costs, out=out, events=events, as_json=as_json)
        return
    given = _given(context, config)
    refuse_idle_hardware(given, has_cost_model=costs is not None)
    requests = sample_trace() if trace is None else load_trace(trace, session_gap_s=session_gap)
    if limit is not None:
        requests = requests.head(limit)
    can_swap = preemption != "recompute"
    refuse_idle_options(given, requests.priorities, can_swap=can_swap, prefix_caching=prefix_caching)
    make_folder("--out", out)
    with _event_log(events) as sink, progress_bar("replaying", len(requests)) as progress:
        run = run_replay(requests, config, cost_model=costs, sink=sink, progress=progress)
    summary = summarize(run)
    paths = write_reports(run, out, summary)
    if as_json:
        typer.echo(summary_text(run, summary))
    else:
        print_summary(run, summary, paths)
    _fail_if_nothing_was_served(summary)


def _fail_if_nothing_was_served(summary: Mapping[str, Any]) -> None:
    if not summary["num_finished"]:
        typer.echo(f"nothing was served: all {summary['num_requests']:,} requests were rejected", err=True)
        raise typer.Exit(1)


def _given(context: typer.Context, config: ReplayConfig) -> dict[str, Any]:
    """The options that stand on the command line, as fields of the configuration."""
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    renamed = {"check": "checks"}
    return {name: getattr(config, name) for name in (renamed.get(n, n) for n in sorted(given)) if hasattr(config, name)}


def _replay_recorded(
    folder: Path, options: dict[str, Any], costs: StepCosts | None, *, out: Path, events: Path | None, as_json: bool
) -> None:
    """Replay a recorded run and compare: the same reports, with `comparison` among the figures."""
    from pagedkv.simulations.idle_options import refuse_idle_options
    from pagedkv.simulations.metrics import summarize
    from pagedkv.simulations.recorded_replay import replay_run
    from pagedkv.simulations.reports import print_summary, summary_text, write_reports
    from pagedkv.simulations.run_comparison import compare_run, print_comparison
    from pagedkv.simulations.run_records import read_run

    record = read_run(folder)
    refuse_idle_options(
        options,
        record.requests.priority,
        can_swap=options.get("preemption", type(record.header.preemption).__name__.lower()) != "recompute",
        prefix_caching=options.get("prefix_caching", record.header.cache.prefix_caching),
    )
    make_folder("--out", out)
    with _event_log(events) as sink, progress_bar("replaying", len(record.trace)) as progress:
        run = replay_run(record, costs, options, sink=sink, progress=progress)
    summary = {**summarize(run), "comparison": compare_run(record, run)}
    paths = write_reports(run, out, summary)
    if as_json:
        typer.echo(summary_text(run, summary))
    else:
        print_summary(run, summary, paths)
        typer.echo()
        print_comparison(summary["comparison"], run.configuration["changed_options"])
        if not record.header.is_complete:
            typer.echo("the run was cut off: recorded steps also served requests that are not in its trace")
    _fail_if_nothing_was_served(summary)


@contextmanager
def _event_log(path: Path | None) -> Iterator[EventSink | None]:
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise ConfigError(f"--events: expected a file that can be written, found {one_line(error)}") from None
    with file:
        yield EventLog(file)


def _mount_others() -> None:
    from pagedkv.simulations.cache_command import cache
    from pagedkv.simulations.fit_command import fit
    from pagedkv.simulations.liveness_command import liveness
    from pagedkv.simulations.soak_command import soak
    from pagedkv.simulations.traces.command import app as traces_app
    from pagedkv.simulations.verify_command import verify

    app.command()(cache)
    app.command()(fit)
    app.command()(soak)
    app.command()(liveness)
    app.command()(verify)
    app.add_typer(traces_app, name="traces", help="List, describe, convert and generate request traces.")


def main() -> None:
    """Run the command; errors of the user are one line on standard error and exit code 2."""
    if sys.argv[1:2] != ["replay"]:  # Its imports would be a tenth of a replay's start-up.
        _mount_others()
    try:
        sys.exit(app(standalone_mode=False))
    except USAGE_ERROR as error:
        message = " ".join(error.format_message().split())
        if message:  # Else help was asked for by giving nothing at all, and has been shown.
            typer.echo(f"error: {message}", err=True)
    except (PagedKVError, OSError) as error:
        typer.echo(f"error: {one_line(error)}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
