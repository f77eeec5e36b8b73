"""Decode steps through padded, fixed inputs give the tokens that plain steps give, and touch nothing else."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_model
from tensor_tape import TapeCapture
from torch import Tensor

from pagedkv.engine import LLM, SamplingParams
from pagedkv.engine.device import DecodeGraphs, DeviceBlockTables, GraphCapture, bucket_sizes
from pagedkv.scheduler import Scheduler, SchedulerConfig, StepPlan

BLOCK_SIZE = 4
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
# No two numbers of rows in which all of them decode fill a bucket; windows are 12 tokens long.
LENGTHS = {3: (5, 17, 33), 5: (1, 9, 17, 33, 60), 9: (2, 3, 5, 8, 13, 21, 34, 55, 30), 11: tuple(range(10, 21))}


@cache
def model_of(family: str) -> Any:
    return make_model(family)


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(1, VOCABULARY, length).tolist() for length in lengths]


class GraphedEngine:
    """An engine of which steps go through graphs where there is one; `used` says of which."""

    def __init__(
        self, family: str, capture: GraphCapture | None = None, *, max_width: int = 40, **options: Any
    ) -> None:
        scheduler_config = options.pop("scheduler_config", SchedulerConfig(512, 16))
        self.llm = LLM(
            model_of(family),
            num_blocks=options.pop("num_blocks", 220),
            block_size=BLOCK_SIZE,
            scheduler_config=scheduler_config,
            self_check=False,
            **options,
        )
        engine = self.llm.engine
        self.scheduler: Scheduler = engine.scheduler
        self.graphs = DecodeGraphs(
            engine.model, max_rows=scheduler_config.max_num_running, max_width=max_width, capture=capture
        )
        self.tables = DeviceBlockTables(BLOCK_SIZE, "cpu")
        self.used: list[bool] = []
        runner = engine._runner
        runner._tables, runner._graphs = self.tables, self  # type: ignore[assignment]

    def forward(self, plan: StepPlan, tables: DeviceBlockTables) -> Tensor | None:
        """Stands in for the graphs that the engine would have on CUDA."""
        logits = self.graphs.forward(plan, tables)
        self.used.append(logits is not None)
        return logits

    def tokens(self, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[Any]:
        outputs = self.llm.generate(prompts, params)
        assert [output.error for output in outputs] == [None] * len(prompts)
        return [[completion.token_ids for completion in output.completions] for output in outputs]


def plain_tokens(family: str, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[Any]:
    llm = LLM(model_of(family), num_blocks=220, block_size=BLOCK_SIZE, self_check=False)
    return [[completion.token_ids for completion in output.completions] for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("num_rows", LENGTHS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
def test_tokens_equal_those_of_plain_steps(family: str, num_rows: int) -> None:
    engine = GraphedEngine(family)

    assert engine.tokens(prompts_of(LENGTHS[num_rows])) == plain_tokens(family, prompts_of(LENGTHS[num_rows]))
    assert engine.used == [False] + [True] * 23


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "deepseek_v3", "bloom"])
def test_repeated_tensor_operations_alone_give_the_same_tokens(family: str) -> None:
    """So nothing that a step needs is left to Python, which a graph does not run."""
    capture = TapeCapture()
    engine = GraphedEngine(family, capture)

    for num_rows in (5, 3, 5):
        prompts = prompts_of(LENGTHS[num_rows])
        assert engine.tokens(prompts) == plain_tokens(family, prompts)
    assert capture.asked == [
        *["warm_up", "capture", *["repeat"] * 22],
        *["warm_up", "capture", *["repeat"] * 22],
        *["repeat"] * 23,
    ]


def test_tokens_stay_the_same_while_requests_are_preempted_and_finish_one_by_one() -> None:
    capture = TapeCapture()
    engine = GraphedEngine("llama", capture, num_blocks=22, scheduler_config=SchedulerConfig(64, 6))
    prompts = prompts_of((5, 17, 33, 8, 2))
    outputs = engine.llm.generate(prompts, [SamplingParams(max_tokens=n, temperature=0.0) for n in (9, 30, 20, 40, 14)])

    found = [output.token_ids for output in outputs]
    wanted = [tokens[0] for tokens in plain_tokens("llama", prompts, SamplingParams(max_tokens=40, temperature=0.0))]
    assert found == [tokens[:n] for tokens, n in zip(wanted, (9, 30, 20, 40, 14), strict=True)]
    assert sum(output.timings.num_preemptions for output in outputs) > 0
    assert capture.asked.count("repeat") > 20


def test_steps_of_one_token_each_whose_rows_do_not_all_sample_give_logits_for_those_that_do() -> None:
    """Prompts computed token by token, and a request that forks when its prompt is done: three rows sample from one."""
    engine = GraphedEngine("llama", scheduler_config=SchedulerConfig(8, 8, long_prefill_tokens=1))
    prompts = prompts_of((7, 7))
    params = SamplingParams(max_tokens=6, temperature=1.0, n=3, seed=5)

    assert engine.tokens(prompts, params) == plain_tokens("llama", prompts, params)
    assert all(engine.used)


def test_a_padded_step_reads_and_writes_nothing_but_its_own_rows() -> None:
    engine = GraphedEngine("llama")
    storage = engine.llm.engine.storage
    caches = [cache(layer) for cache in (storage.key_cache, storage.value_cache) for layer in range(2)]
    for cached in caches:
        cached.fill_(torch.nan)
    prompts = prompts_of((5, 17, 33))

    assert engine.tokens(prompts) == plain_tokens("llama", prompts)
    # 5 + 17 + 33 tokens of the prompts and 23 new ones each, for the last token of all is never computed.
    assert [int((~cached.isnan()).all(dim=(2, 3)).sum()) for cached in caches] == [124] * 4


def test_sizes_are_small_powers_of_two_and_then_multiples_of_eight() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(3) == [1, 2, 3]
    assert bucket_sizes(8) == [1, 2, 4, 8]
    assert bucket_sizes(36) == [1, 2, 4, 8, 16, 24, 32, 36]


def test_a_step_with_longer_tables_than_the_graphs_have_is_left_to_the_caller() -> None:
    engine = GraphedEngine("llama", max_width=5)

    # A prompt of 9, and 20 more tokens: those from the 21st on need a sixth block.
    tokens = engine.tokens(prompts_of((9,)), SamplingParams(max_tokens=20, temperature=0.0))
    assert tokens == plain_tokens("llama", prompts_of((9,)), SamplingParams(max_tokens=20, temperature=0.0))
    assert engine.used == [False] + [True] * 11 + [False] * 8


def test_a_model_that_cannot_be_captured_is_run_plainly_after_one_warning() -> None:
    """Here a mixture of experts that looks which of them were hit."""
    capture = TapeCapture()
    engine = GraphedEngine("mixtral", capture)
    model_of("mixtral").set_experts_implementation("eager")
    prompts = prompts_of((5, 17, 33))

    message = r"MixtralForCausalLM run without CUDA graphs, .*: RuntimeError: aten::nonzero waits for the device$"
    with pytest.warns(RuntimeWarning, match=message):
        assert engine.tokens(prompts) == plain_tokens("mixtral", prompts)
    # A second warning would be an error.
    assert engine.tokens(prompts[:1]) == plain_tokens("mixtral", prompts[:1])
    # The step that found it out was served by the warm-up.
    assert engine.used == [False, True] + [False] * 22 + [False] * 24
    assert capture.asked == ["warm_up", "capture"]
    assert engine.graphs.is_given_up


def test_an_error_of_the_model_itself_is_not_taken_for_one_of_the_capture() -> None:
    engine = GraphedEngine("llama", TapeCapture())
    prompts = prompts_of((5, 17, 33))
    calls = 0

    def fail_in_the_first_decode(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError("once")

    hook = model_of("llama").register_forward_pre_hook(fail_in_the_first_decode)
    try:
        tokens = engine.tokens(prompts)
    finally:
        hook.remove()

    assert tokens == plain_tokens("llama", prompts)
    assert engine.used == [False] + [True] * 23
    assert not engine.graphs.is_given_up
