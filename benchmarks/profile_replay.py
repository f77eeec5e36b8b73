"""Where does the time of a replay go? A profile of 10,000 Azure conversation requests, by function.

The profiler itself slows calls down, so shares are what counts. Writes benchmarks/results/replay_profile.json. Reads a
public trace of docs/traces.md.
"""

from __future__ import annotations

import cProfile
import json
import pstats
from pathlib import Path

from harness import RESULTS, know_only_help, machine
from public_traces import AZURE_CONVERSATION, missing

from pagedkv.simulations.replay import ReplayConfig, replay
from pagedkv.simulations.traces import load_trace

NUM_ROWS = 30


def name_of(function: tuple[str, int, str]) -> str:
    """`file: function`, without the machine's folders."""
    path, _, name = function
    return f"{Path(path).name}: {name}" if path != "~" else name


def main() -> None:
    know_only_help(__doc__ or "")
    if missing(AZURE_CONVERSATION):
        return
    trace = load_trace(AZURE_CONVERSATION).head(10_000)
    profiler = cProfile.Profile()
    profiler.runcall(replay, trace, ReplayConfig())
    stats = pstats.Stats(profiler)
    total = stats.total_tt  # type: ignore[attr-defined]
    rows = [
        {
            "function": name_of(function),
            "calls": calls,
            "own_share": round(own / total, 4),
            "share": round(all_in / total, 4),
        }
        for function, (_, calls, own, all_in, _) in stats.stats.items()  # type: ignore[attr-defined]
    ]
    by_own = sorted(rows, key=lambda row: -row["own_share"])[:NUM_ROWS]
    by_all = sorted(rows, key=lambda row: -row["share"])[:NUM_ROWS]
    for row in by_all:
        print(f"{row['share']:6.1%} {row['own_share']:6.1%} {row['calls']:8} {row['function']}")
    content = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "by_share": by_all,
        "by_own_share": by_own,
    }
    (RESULTS / "replay_profile.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
