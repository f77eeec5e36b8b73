"""Which error paths does no test take? Lists every `raise` that a coverage report calls missing; exit code 1 if there is one.

    coverage json -o coverage.json && python benchmarks/unreached_raises.py coverage.json [--but pagedkv/storage/tensors.py]

The report comes from coverage (docs/reliability.md has the command). Branch coverage counts a `raise` as one line among
many; here it counts alone, because an error that was never raised may not even be spelt right.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path


def raises(source: str) -> list[ast.Raise]:
    """Every `raise` of a source, in order; not those of abstract methods, which nobody is to reach."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and "NotImplementedError" not in ast.unparse(node)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--but", action="append", default=[], metavar="FILE", help="leave this file out")
    options = parser.parse_args()
    files = json.loads(options.report.read_text())["files"]
    num_raises = 0
    unreached = []
    for path in sorted(set(files) - set(options.but)):
        missing = set(files[path]["missing_lines"])
        lines = Path(path).read_text().splitlines()
        for node in raises(Path(path).read_text()):
            num_raises += 1
            if node.lineno in missing:
                unreached.append(f"{path}:{node.lineno}: {lines[node.lineno - 1].strip()}")
    print(
        f"{num_raises} raises in {len(files)} files, {len(unreached)} of them reached by no test", *unreached, sep="\n"
    )
    sys.exit(1 if unreached else 0)


if __name__ == "__main__":
    main()
