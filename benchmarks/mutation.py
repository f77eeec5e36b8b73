"""Do the tests notice? Small bugs are planted in the memory's and the scheduler's code, one at a time, and the tests run.

    python benchmarks/mutation.py --sample 150 --seed 1 [--only pagedkv/block_pool.py] [--json out.json]
    python benchmarks/mutation.py --part scheduler --sample 100

Works on a copy in a temporary folder. Same seed and source, same mutants. A mutant is killed if a test fails, or takes more
than ten times its CPU time; survivors are printed with file, line and change. The score is killed / (all - equivalent):
mutants that cannot be told from the original are listed by hand in `mutation_equivalents.py`, with the reason. `mutants.py`
says what is planted, `mutation_runs.py` how tests are run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mutants import Mutant, mutants_of
from mutation_equivalents import EQUIVALENT
from mutation_runs import Verdict, measure_baseline, run_mutants

ROOT = Path(__file__).resolve().parents[1]
LONGEST_S = 1.0
"""What no quicker test notices costs every test that enters its function: long ones decide few mutants at a high price."""


@dataclass(frozen=True, slots=True)
class Part:
    """Files that are changed together, and the tests that ought to notice."""

    paths: tuple[str, ...]
    tests: tuple[str, ...]
    unfit: tuple[str, ...] = ()  # Test files that can say nothing, by the beginning of their names.
    long: tuple[str, ...] = ()  # Test files that take longer than all others together.


PARTS = {
    "memory": Part(
        paths=(
            "pagedkv/block_pool.py",
            "pagedkv/prefix_cache.py",
            *(
                f"pagedkv/eviction/{name}.py"
                for name in ("fifo", "leaf_first", "leaf_heap", "lru", "policies", "prefix_tree", "s3fifo", "sieve")
            ),
        ),
        tests=("tests/pagedkv",),
        # Planted bugs are looked for in the source; storage knows nothing of these files, and costs an import of torch.
        unfit=("test_planted_bugs", "test_storage"),
        long=("test_state_machine", "test_policy_machine", "test_golden_counts"),
    ),
    "queue": Part(paths=("pagedkv/scheduler/waiting_queue.py",), tests=("tests/scheduler",)),
    "scheduler": Part(
        paths=tuple(
            f"pagedkv/scheduler/{name}.py"
            for name in ("admission", "ending", "order", "preemption", "refusal", "rollback", "shortage")
        ),
        tests=("tests/scheduler",),
    ),
}
# Tests must neither look for smaller examples nor keep any: a mutant needs one failure.
PROFILE = """

from hypothesis import Phase

settings.register_profile("mutants", deadline=None, derandomize=True, database=None, report_multiple_bugs=False,
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
"""


def main() -> None:
    options = parsed_options()
    verdicts: list[Verdict] = []
    num_all = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_project(folder)  # Before the mutants are listed: the checkout may change meanwhile.
        everything = [
            mutant
            for part in options.part
            for path in PARTS[part].paths
            for mutant in mutants_of(path, (folder / path).read_text())
            if not options.only or not {mutant.path, mutant.name}.isdisjoint(options.only)
        ]
        if not everything:
            raise SystemExit(f"there is no mutant {', '.join(options.only)}")
        num_all = len(everything)
        chosen = everything
        if 0 < options.sample < num_all:
            chosen = Random(options.seed).sample(everything, options.sample)  # noqa: S311 - repeatable, not secret
        if options.list:
            print(*chosen, sep="\n")
            return
        for part in options.part:
            of_part = [mutant for mutant in chosen if mutant.path in PARTS[part].paths]
            if of_part:
                verdicts += hunt(folder, PARTS[part], of_part, options)
    score = report(verdicts, num_all, options, time.monotonic() - started)
    if score < options.at_least:
        sys.exit(f"error: the score is {score}, at least {options.at_least} are asked for")


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="how many mutants; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: memory and queue")
    files = [path for part in PARTS.values() for path in part.paths]
    parser.add_argument(
        "--only", action="append", metavar="FILE[:PLACE:KIND]", help="mutants of this file, or this mutant"
    )
    parser.add_argument(
        "--thorough", action="store_true", help=f"with tests that take more than {LONGEST_S} s of CPU too"
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SCORE", help="exit code 1 below this score")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args()
    if options.only:
        named = {only.partition(":")[0] for only in options.only}
        if not named <= set(files):
            parser.error(f"--only takes mutants of {', '.join(files)}; found {', '.join(sorted(named - set(files)))}")
        options.part = [name for name, part in PARTS.items() if named & set(part.paths)]
    options.part = options.part or ["memory", "queue"]
    return options


def copy_project(folder: Path) -> None:
    """The package with its links followed, and the tests."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", "out-*")
    for name in ("pagedkv", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=False, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    with (folder / "tests" / "conftest.py").open("a") as file:
        file.write(PROFILE)


def hunt(folder: Path, part: Part, mutants: list[Mutant], options: argparse.Namespace) -> list[Verdict]:
    """Run the tests of every mutant, and print what became of each."""
    left_out = part.unfit if options.thorough else part.unfit + part.long
    tests = [
        str(path.relative_to(folder))
        for name in part.tests
        for path in sorted((folder / name).rglob("test_*.py"))
        if not path.stem.startswith(left_out)
    ]
    baseline = measure_baseline(folder, part.paths, tests)
    seconds = baseline.seconds.values()
    quick = baseline if options.thorough else baseline.without_those_over(LONGEST_S)
    print(f"{len(seconds)} tests pass without a mutant in {sum(seconds):.0f} s,", end=" ")
    print(f"{len(quick.seconds)} of them in {sum(quick.seconds.values()):.0f} s: these are run", flush=True)
    verdicts = []
    for verdict in run_mutants(folder, mutants, quick, options.jobs):
        verdicts.append(verdict)
        what = "SURVIVED" if verdict.killer is None else "killed  "
        print(f"{len(verdicts):4} {what} {verdict.cpu_s:5.1f} s {verdict.mutant}    by: {verdict.killer}", flush=True)
    return verdicts


def report(verdicts: list[Verdict], num_all: int, options: argparse.Namespace, wall_s: float) -> float:
    """Print what was found, and return the score."""
    survivors = [verdict.mutant for verdict in verdicts if verdict.killer is None]
    equivalent = [mutant for mutant in survivors if (mutant.path, mutant.context, mutant.change) in EQUIVALENT]
    num_killed, num_told = len(verdicts) - len(survivors), len(verdicts) - len(equivalent)
    score = round(num_killed / num_told, 3) if num_told else 1.0
    summary = {
        "num_mutants": num_all,
        "num_tried": len(verdicts),
        "num_killed": num_killed,
        "num_timed_out": sum(verdict.ran_out_of_time for verdict in verdicts),
        "num_equivalent": len(equivalent),
        "score": score,
        "seed": options.seed,
        "cpu_s": round(sum(verdict.cpu_s for verdict in verdicts), 1),
        "wall_s": round(wall_s, 1),
        "python": sys.version.split()[0],
        "survivors": [
            {"mutant": str(mutant), "again with": f"python benchmarks/mutation.py --only '{mutant.name}'"}
            for mutant in sorted(survivors, key=str)
            if mutant not in equivalent
        ],
    }
    print(json.dumps(summary, indent=2))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")
    return score


if __name__ == "__main__":
    main()
