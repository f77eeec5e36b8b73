"""Do the tests notice? Small bugs are planted in the memory's and the queue's code, one at a time, and the tests run.

    python benchmarks/mutation.py --sample 150 --seed 1 [--module pagedkv/block_pool.py] [--json out.json]

Works on a copy in a temporary folder. Same seed and source, same mutants. A mutant is killed if a test fails or its time
runs out; survivors are printed with file, line and change. The score is killed / (all - equivalent): mutants that cannot
be told from the original are listed by hand in EQUIVALENT, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]

QUICK = ("test_manager", "test_row_memory", "test_behaviours", "test_recount", "test_checks")
POLICIES = ("lru", "fifo", "s3fifo", "sieve", "prefix_tree", "policies")
THOROUGH = ("tests/pagedkv/eviction", "tests/pagedkv/test_state_machine.py")
MEMORY_TESTS = (*(f"tests/pagedkv/{name}.py" for name in QUICK), *THOROUGH)
EVICTION_TESTS = (*(f"tests/pagedkv/eviction/test_{name}.py" for name in POLICIES), *MEMORY_TESTS)
# The quickest tests come first: they kill most.
TESTS = {
    "pagedkv/block_pool.py": ("tests/pagedkv/test_block_pool.py", "tests/pagedkv/test_prefix_cache.py", *MEMORY_TESTS),
    "pagedkv/prefix_cache.py": ("tests/pagedkv/test_prefix_cache.py", *MEMORY_TESTS),
    **{
        f"pagedkv/eviction/{name}.py": EVICTION_TESTS
        for name in ("fifo", "leaf_first", "leaf_heap", "lru", "policies", "prefix_tree", "s3fifo", "sieve")
    },
    "pagedkv/scheduler/waiting_queue.py": ("tests/scheduler",),
}
# (file, its line, change) -> why nobody could tell.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "pagedkv/block_pool.py",
        "if num_blocks.__class__ is not int or num_blocks < 0:",
        "num_blocks < 0 -> num_blocks <= 0",
    ): "0 is then looked at by as_int, which takes it",
    (
        "pagedkv/eviction/fifo.py",
        "self._leaves.discard(block_ids)",
        "self._leaves.discard(block_ids) -> pass",
    ): "an entry of a block that lost its name is passed over anyway: the block may not go, or has a new number",
    ("pagedkv/eviction/leaf_first.py", "self._next_number = 0", "0 -> 1"): "numbers are only compared with each other",
    (
        "pagedkv/eviction/prefix_tree.py",
        "self._set_tables(np.full(num_blocks + 1, HELD, np.int32), np.full(num_blocks, UNNAMED, np.int32))",
        "1 -> 2",
    ): "one more place behind the last, which nobody reads",
}

# Tests must neither look for smaller examples nor keep any: a mutant needs one failure.
PROFILE = """

from hypothesis import Phase

settings.register_profile("mutants", deadline=None, derandomize=True, database=None, report_multiple_bugs=False,
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
"""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: which node, what is done to it."""

    path: str
    place: int
    kind: str
    line: int
    change: str
    context: str


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], ast.AST | None]]]:
    """What can be done to a node: a name, and a function that changes a copy of it; None removes a statement."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", lambda n: _with(n, ops=[COMPARISONS[type(n.ops[0])](), *n.ops[1:]])
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", lambda n: _with(n, op=OPERATORS[type(n.op)]())
    if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield "operator", lambda n: _with(n, op=OPERATORS[type(n.op)]())
    if isinstance(node, ast.BoolOp):
        yield "and/or", lambda n: _with(n, op=ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "sign", lambda n: n.operand
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare):
        yield "condition", lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "number + 1", lambda n: ast.Constant(n.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "not", lambda n: ast.Constant(not n.value)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.step is not None:
        yield "not reversed", lambda n: _with(n, slice=ast.Slice(n.slice.lower, n.slice.upper, None))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call left out", lambda _: ast.Pass()
    if isinstance(node, ast.Assign | ast.AugAssign) and isinstance(_target(node), ast.Attribute | ast.Subscript):
        yield "assignment left out", lambda _: ast.Pass()
    if isinstance(node, ast.Delete):
        yield "del left out", lambda _: ast.Pass()
    if isinstance(node, ast.Break | ast.Continue):
        yield "loop", lambda _: ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _target(node: ast.Assign | ast.AugAssign) -> ast.expr:
    return node.target if isinstance(node, ast.AugAssign) else node.targets[0]


def places(tree: ast.Module) -> list[ast.AST]:
    """Nodes of code that runs, in the order of the source: no docstrings, annotations, messages or checks of types."""
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            return
        found.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            if (
                name == "value"
                and isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) in ("__slots__", "__all__")
            ):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(tree)
    return found


def mutants_of(path: str, source: str) -> list[Mutant]:
    lines = source.splitlines()
    found = []
    for place, node in enumerate(places(ast.parse(source))):
        for kind, change in changes(node):
            before = ast.unparse(node).splitlines()[0]
            changed = change(node)
            after = ast.unparse(ast.fix_missing_locations(changed)).splitlines()[0] if changed is not None else ""
            line = getattr(node, "lineno", 0)
            context = lines[line - 1].strip() if line else ""
            found.append(Mutant(path, place, kind, line, f"{before} -> {after}", context))
    return found


def mutated(source: str, mutant: Mutant) -> str:
    """The source of a file with one mutant in it."""
    tree = ast.parse(source)
    wanted = places(tree)[mutant.place]
    change = dict(changes(wanted))[mutant.kind]

    class Planter(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST | None:
            return change(node) if node is wanted else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Planter().visit(tree)))


def copy_project(folder: Path) -> None:
    """The package with its links followed, and the tests."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", "out-*")
    for name in ("pagedkv", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=False, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    with (folder / "tests" / "conftest.py").open("a") as file:
        file.write(PROFILE)


def run_tests(folder: Path, tests: tuple[str, ...], limit_s: float) -> tuple[bool, str]:
    """Whether all tests pass, and the name of the first that fails."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    command += ["--deselect", "tests/pagedkv/test_planted_bugs.py", "--tb", "no"]
    try:
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False, "time ran out"
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if ran.returncode not in (0, 1, 2, 3, 4):
        raise RuntimeError(f"pytest ended with {ran.returncode}: {ran.stdout[-500:]}{ran.stderr[-500:]}")
    return ran.returncode == 0, failed[0] if failed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="how many mutants; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--module", action="append", choices=sorted(TESTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_project(folder)  # Before the mutants are listed: the checkout may change meanwhile.
        everything = [
            mutant for path in options.module or TESTS for mutant in mutants_of(path, (folder / path).read_text())
        ]
        chosen = everything
        if 0 < options.sample < len(everything):
            chosen = Random(options.seed).sample(everything, options.sample)  # noqa: S311 - repeatable, not secret
        if options.list:
            for mutant in chosen:
                print(f"{mutant.path}:{mutant.line}: {mutant.kind}: {mutant.change}    in: {mutant.context}")
            return
        results = measure(folder, chosen)
    report(results, len(everything), options)


def measure(folder: Path, chosen: list[Mutant]) -> list[tuple[Mutant, bool, str]]:
    """Run the tests of every mutant; (mutant, whether it survived, what killed it)."""
    limits: dict[tuple[str, ...], float] = {}
    for tests in sorted({TESTS[mutant.path] for mutant in chosen}):
        started = time.monotonic()
        passed, failed = run_tests(folder, tests, 1200)
        if not passed:
            raise SystemExit(f"{tests} fail without any mutant: {failed}")
        limits[tests] = 10 + 5 * (time.monotonic() - started)
    results = []
    for number, mutant in enumerate(chosen, 1):
        original = (folder / mutant.path).read_text()
        (folder / mutant.path).write_text(mutated(original, mutant))
        survived, killer = run_tests(folder, TESTS[mutant.path], limits[TESTS[mutant.path]])
        (folder / mutant.path).write_text(original)
        results.append((mutant, survived, killer))
        verdict = "SURVIVED" if survived else "killed  "
        print(
            f"{number:4} {verdict} {mutant.path}:{mutant.line}: {mutant.kind}: {mutant.change}    in: {mutant.context}",
            flush=True,
        )
    return results


def report(results: list[tuple[Mutant, bool, str]], num_all: int, options: argparse.Namespace) -> None:
    survivors = [mutant for mutant, survived, _ in results if survived]
    equivalent = [mutant for mutant in survivors if (mutant.path, mutant.context, mutant.change) in EQUIVALENT]
    num_told = len(results) - len(equivalent)
    summary = {
        "num_mutants": num_all,
        "num_tried": len(results),
        "num_killed": len(results) - len(survivors),
        "num_timed_out": sum(killer == "time ran out" for _, _, killer in results),
        "num_equivalent": len(equivalent),
        "score": round((len(results) - len(survivors)) / num_told, 3) if num_told else 1.0,
        "seed": options.seed,
        "python": sys.version.split()[0],
        "survivors": [
            f"{m.path}:{m.line}: {m.kind}: {m.change}    in: {m.context}" for m in survivors if m not in equivalent
        ],
    }
    print(json.dumps(summary, indent=2))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
