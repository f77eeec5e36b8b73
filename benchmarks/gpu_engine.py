"""Are decode steps through CUDA graphs right, and how many tokens per second do they give? Sections of `gpu_check.py`.

The loop here is the least that an engine does: scheduler, storage, paged model, the likeliest token. "host" is the time that
scheduler and block tables take, "launch" the time until everything of a step is given to the GPU. Without graphs that is
what bounds a small batch; with them it is the copy of a few kilobytes and one launch. Peer: `generate` of transformers on
the same model and as many prompts. Needs transformers; without it, the sections say so and are left out.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_all", "figures", "why_left_out"]

Row = dict[str, Any]
BLOCK_SIZE = 16
PROMPT_LENGTHS = (3, 70, 17, 150, 40)  # Five rows, in a bucket of eight.
NUM_NEW = 40
# Of the spread of the logits: of any row in float32, and in the median over rows in bfloat16, where a rounding error may choose
# other experts. Products of padded shapes round in other ways, and no more than that.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
NUM_STEPS = 64
NUM_WARM_STEPS = 8
PROMPT_LENGTH = 128


def why_left_out() -> str | None:
    """Why the engine cannot run here, None if it can."""
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


@dataclass
class Clock:
    """Seconds of each step, by part."""

    host: list[float] = field(default_factory=list)
    launch: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def summary(self, num_steps: int) -> Row:
        """Of the last steps: milliseconds of a step, and microseconds of what the host does in it."""
        total = [1000 * seconds for seconds in self.total[-num_steps:]]
        return {
            "median": statistics.median(total),
            "min": min(total),
            "max": max(total),
            "host_us": 1e6 * statistics.median(self.host[-num_steps:]),
            "launch_us": 1e6 * statistics.median(self.launch[-num_steps:]),
        }


class Loop:
    """A model in a loop with a scheduler, with graphs or without."""

    def __init__(self, model: Any, *, num_running: int, num_blocks: int, with_graphs: bool) -> None:
        from pagedkv import CacheConfig, KVCacheManager
        from pagedkv.engine.device import CudaCapture, DecodeGraphs, DeviceBlockTables
        from pagedkv.engine.model import PagedModel, inspect_model
        from pagedkv.scheduler import Scheduler, SchedulerConfig
        from pagedkv.storage import KVStorage

        layers = inspect_model(model)
        spec = layers[0].kv_spec(len(layers), str(model.dtype).removeprefix("torch."), BLOCK_SIZE)
        device = next(model.parameters()).device
        self.storage = KVStorage(spec, num_blocks, device)
        self.model = PagedModel(model, layers, self.storage)
        manager = KVCacheManager(CacheConfig(num_blocks, BLOCK_SIZE, prefix_caching=False))
        self.scheduler = Scheduler(SchedulerConfig(2048, num_running), manager)
        self.tables = DeviceBlockTables(BLOCK_SIZE, device)
        self.graphs = None
        if with_graphs:
            capture = CudaCapture(device) if device.type == "cuda" else None
            self.graphs = DecodeGraphs(self.model, max_rows=num_running, max_width=num_blocks, capture=capture)
        self.clock = Clock()
        self.num_from_graphs = 0
        self.wrong_tables = 0

    def add(self, prompts: Sequence[Sequence[int]], num_new: int) -> None:
        """Queue prompts, named by their index."""
        from pagedkv.scheduler import Request

        for idx, prompt in enumerate(prompts):
            self.scheduler.add(Request(str(idx), list(prompt), num_new), 0.0)

    def step(self, forced: Any = None, *, checks_tables: bool = False) -> tuple[Tensor, Any]:
        """One step: its logits, a copy if they are checked, and its tokens, which are `forced` if these are given."""
        from pagedkv.engine.step_inputs import StepInputs

        begun = time.perf_counter()
        plan = self.scheduler.schedule(0.0)
        self.storage.apply(plan)
        tables = self.scheduler.block_tables
        logits = None
        if self.graphs is not None:
            self.tables.update(plan, tables)
        planned = time.perf_counter()
        if self.graphs is not None:
            logits = self.graphs.forward(plan, self.tables)
            self.num_from_graphs += logits is not None
        if logits is None:
            logits = self.model.forward(StepInputs.of_plan(plan, tables[plan.rows], self.model.device))
        likeliest = logits.argmax(dim=-1).to(torch.int32)
        launched = time.perf_counter()
        tokens = likeliest.cpu().numpy() if forced is None else forced
        if checks_tables:
            logits = logits.clone()
            self._check_tables(plan)
        computed = time.perf_counter()
        self.scheduler.update(plan, tokens, 0.0)
        ended = time.perf_counter()
        self.clock.host.append(planned - begun + ended - computed)
        self.clock.launch.append(launched - planned)
        self.clock.total.append(ended - begun)
        return logits, tokens

    def _check_tables(self, plan: Any) -> None:
        for row, length in zip(plan.rows.tolist(), plan.seq_lens.tolist(), strict=True):
            used = slice(0, -(-length // BLOCK_SIZE))
            if self.graphs is not None:
                found = self.tables.tables[row, used].cpu().numpy()
                self.wrong_tables += not np.array_equal(found, self.scheduler.block_tables[row, used])


def check_all(device: str = "cuda") -> list[str]:
    """What is wrong, a line for each case; an empty list if nothing is."""
    reason = why_left_out()
    if reason is not None:
        print(f"engine: left out, {reason}")
        return []
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "engine"))
    from families import make_model
    from gpu_cases import brief

    found: list[str] = []
    families = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "mixtral")
    for family in families:
        for dtype in (torch.float32, torch.bfloat16):
            model = make_model(family).to(device=device, dtype=dtype)
            try:
                lines = _wrong(model, dtype)
            # Whatever one model raises, the others are still to be told of.
            except Exception as error:  # noqa: BLE001
                lines = [brief(error)]
            found += [f"engine, {family} {dtype}: {line}" for line in lines]
    print(f"engine: {2 * len(families)} cases, {len(found)} wrong")
    return found


def _wrong(model: Any, dtype: torch.dtype) -> list[str]:
    """Plain steps, then the same tokens through graphs; in float32 also those of `generate`."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 160, length).tolist() for length in PROMPT_LENGTHS]
    plain, graphed = (
        Loop(model, num_running=8, num_blocks=64, with_graphs=with_graphs) for with_graphs in (False, True)
    )
    plain.add(prompts, NUM_NEW)
    graphed.add(prompts, NUM_NEW)
    errors, texts = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while plain.scheduler.has_work:
            logits, tokens = plain.step()
            texts.append(tokens)
            others, _ = graphed.step(tokens, checks_tables=True)
            difference = (others - logits).float().abs().amax(dim=-1) / logits.float().std(dim=-1)
            errors.append(float(difference.max() if dtype == torch.float32 else difference.median()))
    given_up = [str(warning.message) for warning in caught if "CUDA graphs" in str(warning.message)]
    for message in given_up:
        print(f"  {message}")
    wrong = []
    if not max(errors) <= TOLERANCE[dtype]:
        wrong.append(f"logits through graphs differ by {max(errors):.2g} of their spread in step {np.argmax(errors)}")
    if graphed.wrong_tables:
        wrong.append(f"{graphed.wrong_tables} rows of the device's block tables are wrong")
    if not given_up and graphed.num_from_graphs != NUM_NEW - 1:
        wrong.append(f"{graphed.num_from_graphs} steps of {NUM_NEW - 1} went through graphs")
    if dtype == torch.float32:
        wrong += _unlike_generate(model, prompts, np.stack(texts, axis=1))
    return wrong


def _unlike_generate(model: Any, prompts: list[list[int]], tokens: Any) -> list[str]:
    """Greedy tokens in float32 must be those of transformers."""
    wrong = []
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    for prompt, ours in zip(prompts, tokens.tolist(), strict=True):
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        theirs = model.generate(ids, **options)[0, len(prompt) :].tolist()
        if theirs != ours:
            first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            wrong.append(f"a prompt of {len(prompt)} tokens goes on unlike `generate` from new token {first} on")
    return wrong


def make_llama(device: str, **changes: Any) -> Any:
    """A model of 1.2 billion random weights in bfloat16, with the shapes of Llama 3.2 1B (its config.json)."""
    import transformers

    shape = {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**(shape | changes)), dtype=torch.bfloat16
        )
    return model.to(device).eval()


def figures(_: dict[str, float], device: str = "cuda", **changes: Any) -> list[Row]:
    """Decode steps of 1, 32 and 256 running requests, with graphs, without, and by `generate`."""
    reason = why_left_out()
    if reason is not None:
        print(f"  left out: {reason}")
        return []
    model = make_llama(device, **changes)
    rows = []
    for num_running in (1, 32, 256):
        rng = np.random.default_rng(num_running)
        prompts = rng.integers(1, model.config.vocab_size, (num_running, PROMPT_LENGTH))
        for with_graphs in (True, False):
            rows.append(_decode_row(model, prompts, with_graphs=with_graphs))
            _print(rows[-1])
        rows.append(_generate_row(model, prompts))
        _print(rows[-1])
    return rows


def _decode_row(model: Any, prompts: Any, *, with_graphs: bool) -> Row:
    num_running = len(prompts)
    num_new = NUM_STEPS + NUM_WARM_STEPS
    num_blocks = num_running * (-(-(PROMPT_LENGTH + num_new) // BLOCK_SIZE) + 1)
    loop = Loop(model, num_running=num_running, num_blocks=num_blocks, with_graphs=with_graphs)
    loop.add(prompts.tolist(), num_new)
    # Until the prompt that came last has warmed up; the first ones then have some tokens more, and none has ended.
    num_chunks = -(-prompts.size // 2048)
    for _ in range(num_chunks + NUM_WARM_STEPS // 2):
        loop.step()
    num_steps = num_new - num_chunks - NUM_WARM_STEPS // 2 - 1
    for _ in range(num_steps):
        loop.step()
    row = {
        "what": f"{num_running} running, {'graphs' if with_graphs else 'no graphs'}",
        **loop.clock.summary(num_steps),
    }
    return row | {"tokens_per_s": 1000 * num_running / row["median"]}


def _generate_row(model: Any, prompts: Any) -> Row:
    """A step of `generate`: what more new tokens take longer, by their number."""
    ids = torch.from_numpy(prompts).to(next(model.parameters()).device)
    seconds: dict[int, list[float]] = {1: [], 1 + NUM_STEPS: []}
    for _ in range(4):
        for num_new, times in seconds.items():
            begun = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
            )[0, -1].item()
            times.append(time.perf_counter() - begun)
    # The first of each warms up.
    steps = [
        1000 * (many - one) / NUM_STEPS for one, many in zip(*(times[1:] for times in seconds.values()), strict=True)
    ]
    median = statistics.median(steps)
    row = {"what": f"{len(prompts)} prompts, generate", "median": median, "min": min(steps), "max": max(steps)}
    return row | {"tokens_per_s": 1000 * len(prompts) / median}


def _print(row: Row) -> None:
    host = f", host {row['host_us']:.0f} us, launch {row['launch_us']:.0f} us" if "host_us" in row else ""
    print(
        f"  {row['what']}: {row['median']:.2f} ms a step ({row['min']:.2f} to {row['max']:.2f}), "
        f"{row['tokens_per_s']:.0f} tokens/s{host}",
        flush=True,
    )


def main() -> int:
    """Check, then measure; needs a GPU."""
    if not torch.cuda.is_available():
        print("gpu-engine: there is no CUDA GPU here", file=sys.stderr)
        return 2
    wrong = check_all()
    for line in wrong:
        print(f"WRONG {line}")
    if not wrong:
        figures({})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
