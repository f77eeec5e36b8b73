"""Fuzz the parsers: `python tests/fuzz/run.py --seconds 60`. Prints runs, rate and memory of each target, as JSON lines.

Inputs that raise what no caller should have to expect are shrunk, written to `--out`, and printed with the command that
repeats them; they end the run with exit code 1. With atheris installed, `--atheris --target trace` lets libFuzzer guide the
mutations by coverage.
"""

from __future__ import annotations

import argparse
import base64
import json
import resource
import sys
import time
from hashlib import sha256
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from fuzz_mutations import mutants  # noqa: E402

if "--atheris" in sys.argv:
    import atheris

    # Only what is imported in here tells libFuzzer which way it went.
    with atheris.instrument_imports(include=["pagedkv"]):
        if "saved" in sys.argv:
            import pagedkv.storage  # noqa: F401
        from fuzz_targets import TARGETS, Target, try_input
else:
    from fuzz_targets import TARGETS, Target, try_input

from pagedkv.testing.shrinking import shrink_list  # noqa: E402

MAX_COPIED = 3000


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def where_it_fails(target: Target, data: bytes) -> tuple[str, str]:
    """The kind of error and the line that raised it, and its message; empty if the input is taken or properly refused."""
    try:
        try_input(target, data)
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f" at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
        return type(error).__name__ + where, str(error)
    return "", ""


def tell(name: str, where: str, data: bytes, out: Path) -> None:
    """Shrink an input that fails, keep it, and print what fails, with the command that does it again."""
    target = TARGETS[name]
    small = bytes(shrink_list(list(data), lambda kept: where_it_fails(target, bytes(kept))[0] == where))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{sha256(small).hexdigest()[:12]}"
    path.write_bytes(small)
    # Text that can be copied, as the file may not outlive the machine that found it.
    given = base64.b64encode(small).decode() if len(small) <= MAX_COPIED else f"@{path}"
    finding = {
        "target": name,
        "failure": where,
        "message": where_it_fails(target, small)[1][:200],
        "bytes": f"{len(small)} of {len(data)}",
        "again with": f"python tests/fuzz/run.py --target {name} --input {given}",
    }
    print(json.dumps(finding), flush=True)


def repeat(name: str, given: str) -> int:
    """Try one input, base64 or @file; returns 1 if it fails."""
    data = Path(given[1:]).read_bytes() if given.startswith("@") else base64.b64decode(given)
    where, message = where_it_fails(TARGETS[name], data)
    print(json.dumps({"target": name, "failure": where, "message": message[:200]}))
    return 1 if where else 0


def fuzz(name: str, seconds: float, seed: int, out: Path) -> int:
    """Fuzz one target; returns how many different failures were found."""
    target = TARGETS[name]
    random = Random(f"{name}/{seed}")  # noqa: S311 - repeatable, not secret
    seeds = target.seeds()
    for data in seeds:
        try_input(target, data)
    before, started, num_runs, num_accepted = peak_mb(), time.monotonic(), 0, 0
    failures: set[str] = set()
    for data in mutants(seeds, random):
        if num_runs % 64 == 0 and time.monotonic() - started >= seconds:
            break
        num_runs += 1
        try:
            num_accepted += try_input(target, data)
        except Exception:  # noqa: BLE001 - this is what is looked for
            where, _ = where_it_fails(target, data)
            if where not in failures:
                failures.add(where)
                tell(name, where, data, out)
    elapsed = time.monotonic() - started
    print(
        json.dumps(
            {
                "target": name,
                "seed": seed,
                "seconds": round(elapsed, 1),
                "runs": num_runs,
                "runs_per_s": round(num_runs / elapsed),
                "accepted": num_accepted,
                "failures": len(failures),
                "peak_rss_mb": round(peak_mb()),
                "peak_rss_grew_mb": round(peak_mb() - before),
            }
        ),
        flush=True,
    )
    return len(failures)


def fuzz_guided(name: str, seconds: float, seed: int, out: Path) -> None:
    """Hand over to libFuzzer; it ends the process."""
    corpus = out / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in TARGETS[name].seeds():
        (corpus / sha256(data).hexdigest()[:16]).write_bytes(data)

    def read(data: bytes) -> None:
        try_input(TARGETS[name], data)

    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", "-rss_limit_mb=2048", f"-artifact_prefix={out}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--out", type=Path, default=Path("out-fuzz"))
    parser.add_argument("--input", help="try this one only: base64, or @FILE; one target")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; one target")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if options.input is not None:
        sys.exit(repeat(names[0], options.input))
    if options.atheris:
        fuzz_guided(names[0], options.seconds, options.seed, options.out)
        return
    num_failures = sum(fuzz(name, options.seconds / len(names), options.seed, options.out) for name in names)
    sys.exit(1 if num_failures else 0)


if __name__ == "__main__":
    main()
