"""How many tokens does the engine complete per second of CPU, beside transformers' own ways to complete many prompts?

One thread, float32, random weights, greedy; the same tokens are required of all. CPU time of the process.
`python benchmarks/bench_engine.py`; the peers' functions are in engine_peers.py, the arrivals in engine_stream.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
import transformers
from engine_peers import continuous_batch, one_by_one, padded_batch, random_prompts, small_llama
from engine_stream import (
    CALM_LIMITS,
    Latencies,
    azure_workload,
    serve_engine,
    serve_static,
    side_by_side,
    static_capacity,
)
from harness import spread
from public_traces import AZURE_CONVERSATION, missing

from pagedkv.engine import LLM, SamplingParams
from pagedkv.engine.model import PagedModel
from pagedkv.engine.model.few_rows import few_rows_forward, gains_from_few_rows
from pagedkv.engine.sampling import Sampler
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.scheduler import Scheduler

NUM_NEW = 48
NUM_REPEATS = 5
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0)


def take_turns(calls: dict[str, Callable[[], Any]], num_repeats: int = NUM_REPEATS) -> dict[str, list[float]]:
    """CPU seconds of each call, in turn, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ours(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Complete the prompts, the prefix cache empty at first."""
    llm.engine.scheduler.manager.reset_prefix_cache()
    return [list(output.token_ids) for output in llm.generate(prompts, GREEDY)]


def add_rates(report: harness.Report, what: str, seconds: dict[str, list[float]], num_tokens: int) -> None:
    """One row for each: output tokens per CPU second, and how many times ours is as fast, run by run."""
    own = seconds["pagedkv"]
    for name, values in seconds.items():
        figures = spread([num_tokens / value for value in values])
        more = (
            {}
            if name == "pagedkv"
            else {"ours": round(statistics.median(v / o for v, o in zip(values, own, strict=True)), 2)}
        )
        report.add(f"{what}: {name}", figures, "output tokens / CPU s", **more)


def batch_rows(report: harness.Report, model: Any) -> None:
    """32 prompts of 16 to 200 tokens, 48 new each."""
    prompts = random_prompts(32, 16, 200)
    llm = LLM(model, num_blocks=1024)
    expected = one_by_one(model, prompts, NUM_NEW)
    assert ours(llm, prompts) == expected
    calls: dict[str, Callable[[], Any]] = {
        "pagedkv": lambda: ours(llm, prompts),
        "padded generate": lambda: padded_batch(model, prompts, NUM_NEW),
        "generate_batch": lambda: continuous_batch(model, prompts, NUM_NEW),
        "generate, one by one": lambda: one_by_one(model, prompts, NUM_NEW),
    }
    add_rates(report, "32 prompts", take_turns(calls), 32 * NUM_NEW)


def prefix_rows(report: harness.Report, model: Any) -> None:
    """The same with a prefix of 512 tokens, each shared by 8 prompts."""
    prefixes = random_prompts(4, 512, 512, seed=1)
    prompts = [prefixes[i % 4] + prompt for i, prompt in enumerate(random_prompts(32, 16, 200))]
    cached = LLM(model, num_blocks=2048, self_check=False)
    uncached = LLM(model, num_blocks=2048, prefix_caching=False, self_check=False)
    assert ours(cached, prompts) == ours(uncached, prompts)
    calls: dict[str, Callable[[], Any]] = {
        "pagedkv": lambda: ours(cached, prompts),
        "without prefix cache": lambda: ours(uncached, prompts),
        "padded generate": lambda: padded_batch(model, prompts, NUM_NEW),
    }
    add_rates(report, "512 tokens shared by 8", take_turns(calls), 32 * NUM_NEW)


def tight_rows(report: harness.Report, model: Any) -> None:
    """Pools of three quarters, half and a third of the 330 blocks that all prompts need at once."""
    prompts = random_prompts(32, 16, 200)
    pools = {"ample": (1024, None)}
    for num_blocks in (250, 165, 110):
        pools |= {f"{num_blocks} blocks, recompute": (num_blocks, None), f"{num_blocks}, swap": (num_blocks, "16MiB")}
    llms = {
        name: LLM(model, num_blocks=num_blocks, swap_memory=swap, self_check=False)
        for name, (num_blocks, swap) in pools.items()
    }
    expected = ours(llms["ample"], prompts)
    assert all(ours(llm, prompts) == expected for llm in llms.values())
    seconds = take_turns({name: (lambda llm=llm: ours(llm, prompts)) for name, llm in llms.items()})
    for name, llm in llms.items():
        num_preemptions = llm.metrics().num_preemptions // (NUM_REPEATS + 2)
        share = statistics.median(a / b for a, b in zip(seconds["ample"], seconds[name], strict=True))
        figures = spread([32 * NUM_NEW / value for value in seconds[name]])
        more = {"preemptions": num_preemptions, "of_ample": round(share, 2)}
        report.add(f"pool: {name}", figures, "output tokens / CPU s", **more)


def bookkeeping_rows(report: harness.Report, model: Any) -> None:
    """256 running: CPU time of the parts of a decode step, in the midst of the model's passes, which empty the caches."""
    llm = LLM(model, num_blocks=8192, max_num_running=256, max_num_batched_tokens=16384, self_check=False)
    engine = llm.engine
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments)
            spent[name] = spent.get(name, 0.0) + time.thread_time() - start
            return result

        return call

    for i, prompt in enumerate(random_prompts(256, 20, 40)):
        token_ids, params = llm.check(prompt, SamplingParams(max_tokens=200, temperature=0))
        engine.add(str(i), token_ids, params, on_finish=lambda _output: None)
    engine.step()
    Scheduler.schedule = timed("scheduler and manager", Scheduler.schedule)  # type: ignore[method-assign]
    Scheduler.update = timed("scheduler and manager", Scheduler.update)  # type: ignore[method-assign]
    StepInputs.of_plan = timed("metadata", StepInputs.of_plan)  # type: ignore[method-assign]
    PagedModel.forward = timed("model", PagedModel.forward)  # type: ignore[method-assign]
    Sampler.sample = timed("sampling", Sampler.sample)  # type: ignore[method-assign]
    steps = []
    for _ in range(150):
        spent.clear()
        start = time.thread_time()
        engine.step()
        steps.append({"step": time.thread_time() - start} | spent)
    llm.close()
    parts = ("scheduler and manager", "metadata")
    kept = [1e6 * sum(step[part] for part in parts) for step in steps]
    report.add(
        "decode step, 256 running: scheduler, manager, metadata",
        spread(kept),
        "us",
        mean_us=round(statistics.mean(kept)),  # One step in eight names what the others leave to it.
        **{f"{part}_us": round(statistics.median(1e6 * step[part] for step in steps)) for part in (*parts, "model")},
    )
    rest = [1e6 * (step["step"] - step["model"] - step["sampling"]) for step in steps]
    report.add("decode step, 256 running: all but the model and the choice of tokens", spread(rest), "us")


def product_rows(report: harness.Report, model: Any) -> None:
    """All linear layers of a pass on few tokens, one after the other, so that weights come from memory as in a pass."""
    layers = [module for module in model.modules() if gains_from_few_rows(module)]
    stand_ins = [few_rows_forward(layer) for layer in layers]
    for num_rows in (2, 3, 4, 5, 6, 8):
        inputs = [torch.randn(1, num_rows, layer.in_features) for layer in layers]
        calls = {
            name: (lambda forwards=forwards, inputs=inputs: [f(x) for f, x in zip(forwards, inputs, strict=True)])
            for name, forwards in {"ours": stand_ins, "linear": layers}.items()
        }
        with torch.inference_mode():
            seconds = take_turns(calls, num_repeats=100)
        share = statistics.median(own / theirs for own, theirs in zip(seconds["ours"], seconds["linear"], strict=True))
        figures = spread([1e3 * value for value in seconds["ours"]])
        report.add(f"all linear layers, {num_rows} rows", figures, "ms", of_linear=round(share, 2))


def stream_rows(report: harness.Report, model: Any) -> None:
    """At which rate static batches are saturated, and what both do at that rate, and ours at twice that."""
    work = azure_workload()
    rate = static_capacity(model, work)
    cases: dict[str, Callable[[Callable[[], None]], Latencies]] = {
        "static batches at the rate that saturates them": lambda turn: serve_static(model, work, rate, on_step=turn),
        "pagedkv at the same rate": lambda turn: serve_engine(model, work, rate, on_step=turn),
        "pagedkv at twice the rate": lambda turn: serve_engine(model, work, 2 * rate, on_step=turn),
        "pagedkv at twice the rate, admission_interval=64": lambda turn: serve_engine(
            model, work, 2 * rate, limits=CALM_LIMITS, on_step=turn
        ),
        "pagedkv at three times the rate": lambda turn: serve_engine(model, work, 3 * rate, on_step=turn),
    }
    rounds = [side_by_side(cases) for _ in range(3)]
    static = next(iter(cases))
    for name in cases:
        found = [latencies[name] for latencies in rounds]
        figures = spread([latencies.ttft_s * 1e3 for latencies in found])
        tpots = spread([latencies.tpot_s * 1e3 for latencies in found])
        of_static = statistics.median(latencies[name].tpot_s / latencies[static].tpot_s for latencies in rounds)
        ttft_of_static = statistics.median(latencies[name].ttft_s / latencies[static].ttft_s for latencies in rounds)
        report.add(
            f"stream, {name}: p90 TTFT",
            figures,
            "ms",
            p90_tpot_ms=round(tpots["median"], 2),
            tpot_of_static=round(of_static, 2),
            ttft_of_static=round(ttft_of_static, 2),
            requests_per_s=round(rate, 1),
        )


def main() -> None:
    sections: dict[str, Callable[[harness.Report, Any], None]] = {
        "batch": batch_rows,
        "prefix": prefix_rows,
        "tight": tight_rows,
        "bookkeeping": bookkeeping_rows,
        "products": product_rows,
        "stream": stream_rows,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=sections, help="one section; writes no results")
    only = parser.parse_args().only
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    report = harness.Report(__doc__ or "", has_options=True)
    report.machine |= {"torch": torch.__version__, "transformers": transformers.__version__, "threads": "1"}
    model = small_llama()
    for name, section in sections.items():
        if only in (None, name) and not (name == "stream" and missing(AZURE_CONVERSATION)):
            section(report, model)
    if only is None:
        report.name = harness.with_instruction_set(report.name)
        report.write()


if __name__ == "__main__":
    main()
