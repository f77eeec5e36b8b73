"""Which watermark costs least on a pool that is too small?

Simulated, not measured on hardware: the first 6,000 Azure conversation requests, four times as fast as they came, on 2,000 blocks
of 16 (Llama-3-8B on an H100), by watermark and preemption. The regret is the share of throughput that is lost against the
best watermark of the row's mode. Reads a public trace of docs/traces.md.
"""

from __future__ import annotations

import json

from harness import RESULTS, know_only_help, machine
from public_traces import AZURE_CONVERSATION, missing

from pagedkv.simulations.metrics import summarize
from pagedkv.simulations.replay import ReplayConfig, replay
from pagedkv.simulations.traces import load_trace

WATERMARKS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15)


def main() -> None:
    know_only_help(__doc__ or "")
    if missing(AZURE_CONVERSATION):
        return
    trace = load_trace(AZURE_CONVERSATION).head(6000)
    rows = []
    for mode in ("recompute", "swap"):
        runs = []
        for watermark in WATERMARKS:
            config = ReplayConfig(num_blocks=2000, preemption=mode, watermark=watermark, rate_scale=4.0)
            summary = summarize(replay(trace, config))
            runs.append((watermark, summary))
        best = max(summary["output_token_throughput"] for _, summary in runs)
        for watermark, summary in runs:
            rows.append(
                {
                    "preemption": mode,
                    "watermark": watermark,
                    "num_preemptions": summary["num_preemptions"],
                    "output_tokens_per_s": round(summary["output_token_throughput"], 1),
                    "regret": round(1 - summary["output_token_throughput"] / best, 4),
                    "ttft_p90_s": round(summary["ttft_s"]["p90"], 3),
                    "itl_p99_s": round(summary["itl_s"]["p99"], 4),
                }
            )
            print(rows[-1])
    content = {"question": (__doc__ or "").splitlines()[0], "simulated": True, "machine": machine(), "rows": rows}
    (RESULTS / "watermark.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
