"""What users see of LLM: arguments, outputs, streams, memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import VOCABULARY, make_model
from tokenizers_for_tests import make_tokenizer

from pagedkv import ConfigError, InvalidArgumentError
from pagedkv.engine import (
    LLM,
    ContextLengthError,
    EngineClosedError,
    MemoryBudgetError,
    NgramDrafter,
    SamplingParams,
    UnsupportedModelError,
)
from pagedkv.scheduler import FCFS, Priority, RequestTooLargeError, SchedulerConfig, Swap

PROMPTS = [np.random.default_rng(1).integers(1, VOCABULARY, length).tolist() for length in (4, 11, 30)]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture
def no_meminfo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that does not tell its available memory, as any but Linux."""
    read_text = Path.read_text

    def read(path: Path, *args: Any, **options: Any) -> str:
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def make_llm(model: Any, **options: Any) -> LLM:
    return LLM(model, **({"num_blocks": 64, "block_size": 4, "self_check": False} | options))


def test_the_model_is_as_before_when_the_engine_does_not_run_it(model: Any) -> None:
    before = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=5, do_sample=False).tolist()
    llm = make_llm(model)
    llm.generate(PROMPTS, GREEDY)

    assert model.config._attn_implementation == "sdpa"
    assert model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=5, do_sample=False).tolist() == before


def test_outputs_come_in_the_order_of_the_prompts_and_one_prompt_is_a_list_of_one(model: Any) -> None:
    llm = make_llm(model)
    together = llm.generate(PROMPTS, [SamplingParams(max_tokens=n, temperature=0) for n in (3, 1, 2)])

    assert [len(output.token_ids) for output in together] == [3, 1, 2]
    assert [output.prompt_token_ids for output in together] == [tuple(prompt) for prompt in PROMPTS]
    assert [output.token_ids for output in llm.generate(PROMPTS[2], GREEDY)] == [
        llm.generate(PROMPTS, GREEDY)[2].token_ids
    ]
    assert llm.generate([], GREEDY) == []


def test_timings_ascend_and_a_second_request_finds_the_prompt_cached(model: Any) -> None:
    llm = make_llm(model)
    first, second = llm.generate(PROMPTS[2], GREEDY)[0].timings, llm.generate(PROMPTS[2], GREEDY)[0].timings

    assert first.arrival_s <= first.admitted_s <= first.first_token_s <= first.finished_s
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 28
    assert 0 <= second.queue_s <= second.ttft_s <= second.e2e_s


def test_the_same_seed_gives_the_same_samples_alone_and_in_a_crowd(model: Any) -> None:
    params = SamplingParams(max_tokens=10, seed=7, n=3)
    alone = make_llm(model).generate(PROMPTS[1], params)[0].completions
    crowd = make_llm(model, num_blocks=24).generate(PROMPTS + PROMPTS, [GREEDY, params, GREEDY] * 2)

    assert [c.token_ids for c in crowd[1].completions] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in alone}) == 3
    assert [c.index for c in alone] == [0, 1, 2]


def test_samples_of_one_prompt_share_its_blocks(model: Any) -> None:
    llm = make_llm(model)
    used = []
    llm.engine.add(
        "a", np.array(PROMPTS[2], np.int32), SamplingParams(max_tokens=3, n=5, seed=1), on_finish=lambda output: None
    )
    while llm.engine.has_work:
        llm.engine.step()
        used.append(llm.engine.scheduler.manager.statistics().num_used)

    assert max(used) <= 7 + 5 * 2  # seven full blocks of the prompt once, at most two of each sample's own


def test_a_stop_token_ends_a_sample_and_min_tokens_keeps_it_going(model: Any) -> None:
    llm = make_llm(model)
    plain = llm.generate(PROMPTS[0], GREEDY)[0].token_ids
    stop = plain[2]

    stopped = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8, temperature=0, stop_token_ids=[stop]))[0]
    kept = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8, min_tokens=6, temperature=0, stop_token_ids=[stop]))[0]

    assert stopped.token_ids == plain[:3]
    assert (stopped.finish_reason, stopped.completions[0].stop) == ("stop", stop)
    assert len(kept.token_ids) >= 6
    assert stop not in kept.token_ids[:6]


@pytest.mark.parametrize("n", [1, 3])
def test_max_tokens_of_zero_computes_the_prompt_only(model: Any, n: int) -> None:
    llm = make_llm(model)
    output = llm.generate(PROMPTS[2], SamplingParams(max_tokens=0, n=n))[0]

    assert (output.token_ids, output.finish_reason) == ((), "length")
    assert llm.generate(PROMPTS[2], GREEDY)[0].timings.num_cached_tokens == 28


def test_logprobs_are_those_of_the_model(model: Any) -> None:
    output = make_llm(model).generate(PROMPTS[1], SamplingParams(max_tokens=4, temperature=0, logprobs=3))[0]
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPTS[1], *output.token_ids]])).logits[0, len(PROMPTS[1]) - 1 : -1]
    expected = logits.log_softmax(-1)

    for entry, row, token_id in zip(output.completions[0].logprobs, expected, output.token_ids, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert entry.rank == 1
        assert list(entry.alternatives) == row.topk(3).indices.tolist()


def test_a_stream_yields_every_token_and_closing_it_early_frees_everything(model: Any) -> None:
    llm = make_llm(model)
    pieces = list(llm.stream(PROMPTS[1], GREEDY))
    assert sum((piece.token_ids for piece in pieces), ()) == llm.generate(PROMPTS[1], GREEDY)[0].token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 7 + ["length"]

    stream = llm.stream(PROMPTS[2], GREEDY)
    next(stream)
    stream.close()

    assert not llm.engine.has_work
    assert llm.engine.scheduler.manager.statistics().num_used == 0


def test_a_text_that_nobody_streams_is_decoded_in_a_few_calls_and_is_the_streamed_one(model: Any) -> None:
    tokenizer = make_tokenizer()
    params = SamplingParams(max_tokens=40, seed=3)
    streamed = "".join(piece.text for piece in make_llm(model, tokenizer=tokenizer).stream(PROMPTS[0], params))
    num_calls = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, *arguments: Any, **options: Any) -> str:
            nonlocal num_calls
            num_calls += 1
            return tokenizer.decode(*arguments, **options)

    output = make_llm(model, tokenizer=Counting()).generate(PROMPTS[0], params)[0]

    assert len(output.token_ids) == 40
    assert output.text == streamed
    assert num_calls <= 12


def test_two_streams_and_a_batch_run_in_the_same_steps(model: Any) -> None:
    llm = make_llm(model)
    expected = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    first = [next(stream).token_ids for stream in streams]

    batch = llm.generate(PROMPTS[2], GREEDY)

    rest = [sum((piece.token_ids for piece in stream), ()) for stream in streams]
    assert [one + more for one, more in zip(first, rest, strict=True)] == expected[:2]
    assert batch[0].token_ids == expected[2]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([[]], GREEDY, "at least one token"),
        ([1, 2, 160], GREEDY, "tokens 0..159, the prompt holds 160"),
        ([1, -2], GREEDY, "prompt"),
        ("text", GREEDY, "needs a tokenizer"),
        ([1, 2], SamplingParams(stop="x"), "stop strings need a tokenizer"),
        ([1, 2], SamplingParams(logit_bias={160: 1}), "tokens 0..159, logit_bias or allowed_token_ids hold 160"),
        ([1, 2], SamplingParams(allowed_token_ids=[3, 161]), "allowed_token_ids hold 161"),
        ([1] * 500, SamplingParams(max_tokens=13), "exceed the model's 512 positions"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(model: Any, prompt: Any, params: Any, message: str) -> None:
    llm = make_llm(model)

    with pytest.raises(InvalidArgumentError, match=message):
        llm.generate(prompt, params)

    assert not llm.engine.has_work


def test_a_prompt_beyond_the_models_positions_has_an_error_of_its_own(model: Any) -> None:
    with pytest.raises(ContextLengthError, match="a prompt of 513 tokens exceeds the model's 512 positions"):
        make_llm(model).check([1] * 513, SamplingParams(max_tokens=0))


NEVER_FITS = [
    (SamplingParams(stop="x"), InvalidArgumentError, "stop strings need a tokenizer"),
    (SamplingParams(logprobs=161), InvalidArgumentError, "logprobs 161 exceeds the vocabulary of 160 tokens"),
    (
        SamplingParams(max_tokens=30),
        RequestTooLargeError,
        "can never run: 4 prompt \\+ 30 new tokens need 9 blocks of 4, the pool has 8",
    ),
    (
        SamplingParams(max_tokens=8, n=257),
        RequestTooLargeError,
        "can never run: 257 samples need as many seats, there are 256",
    ),
]


@pytest.mark.parametrize(("params", "error", "message"), NEVER_FITS)
def test_a_check_finds_what_no_queue_is_needed_for(model: Any, params: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make_llm(model, num_blocks=8).check(PROMPTS[0], params)


@pytest.mark.parametrize(("params", "error", "message"), NEVER_FITS)
def test_no_prompt_of_a_batch_is_queued_if_one_can_never_run(
    model: Any, params: Any, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(model, num_blocks=8)
    added: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine, "add", lambda *arguments, **_more: added.append(arguments))
        with pytest.raises(error, match=message):
            llm.generate([PROMPTS[0]] * 2, [GREEDY, params])

    assert added == []


def test_a_check_knows_a_clients_share(model: Any) -> None:
    llm = make_llm(model, num_blocks=8, scheduler_config=SchedulerConfig(64, 4, watermark=0, client_share=0.5))

    with pytest.raises(RequestTooLargeError, match="a client's share is 2 and 4"):
        llm.check(PROMPTS[0], SamplingParams(max_tokens=20))


def test_a_request_that_can_never_fit_takes_the_others_of_its_call_back(model: Any) -> None:
    llm = make_llm(model, num_blocks=8)

    with pytest.raises(RequestTooLargeError, match="blocks"):
        llm.generate([PROMPTS[0], PROMPTS[2]], SamplingParams(max_tokens=20, temperature=0))

    assert not llm.engine.has_work
    assert llm.generate(PROMPTS[0], GREEDY)[0].finish_reason == "length"


@pytest.mark.parametrize("verb", ["generate", "stream", "chat"])
def test_priority_salt_and_client_reach_the_scheduler(model: Any, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(make_model("llama", vocab_size=267), tokenizer=make_tokenizer(), policy=Priority())
    added: list[Any] = []
    add = llm.engine.scheduler.add
    monkeypatch.setattr(llm.engine.scheduler, "add", lambda request, now: (added.append(request), add(request, now)))
    prompt = [{"role": "user", "content": "Hello?"}] if verb == "chat" else PROMPTS[0]

    list(getattr(llm, verb)(prompt, GREEDY, priority=-2.5, salt=b"tenant", client="somebody"))

    assert [(request.priority, request.salt, request.client) for request in added] == [(-2.5, b"tenant", "somebody")]


def test_a_priority_that_nobody_looks_at_is_refused(model: Any) -> None:
    llm = make_llm(model, policy=FCFS())
    with pytest.raises(InvalidArgumentError, match=r"priority 5 would do nothing: give LLM a policy .* Priority\(\)"):
        llm.generate(PROMPTS, GREEDY, priority=5)

    assert not llm.engine.has_work
    make_llm(model, policy=Priority()).generate(PROMPTS[0], GREEDY, priority=5)


def test_numbers_of_params_and_prompts_must_agree(model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="3 prompts need as many SamplingParams, or one, found 2"):
        make_llm(model).generate(PROMPTS, [GREEDY, GREEDY])


def test_a_closed_llm_takes_nothing_and_closing_twice_is_fine(model: Any) -> None:
    llm = make_llm(model)
    llm.close()
    llm.close()

    with pytest.raises(EngineClosedError, match="closed"):
        llm.generate(PROMPTS, GREEDY)


# Memory


def test_an_llm_holds_no_results_that_its_caller_let_go_of(model: Any) -> None:
    llm = make_llm(model)
    held: list[weakref.ref[Any]] = []

    class Held:
        def __call__(self, output: Any) -> None:
            """Somebody who waits for a request's end."""

    for number in range(3):
        waiting = Held()
        held.append(weakref.ref(waiting))
        llm.engine.add(str(number), np.array([1, 2], np.int32), GREEDY, on_finish=waiting)
    del waiting
    while llm.engine.has_work:
        llm.engine.step()

    assert [each() for each in held] == [None] * 3


def test_a_closed_llm_holds_no_memory_for_keys_and_values(model: Any) -> None:
    llm = make_llm(model)
    llm.generate(PROMPTS, GREEDY)
    storage = weakref.ref(llm.engine.storage)

    llm.close()

    assert storage() is None


def test_memory_in_bytes_gives_as_many_blocks_as_fit(model: Any) -> None:
    llm = make_llm(model, num_blocks=None, kv_memory="1MiB")

    # 2 layers x 2 heads x (16 + 16) x 4 bytes = 512 bytes a token, four tokens a block
    assert llm.engine.scheduler.manager.config.num_blocks == 2**20 // 2048


def test_without_a_word_it_takes_what_full_seats_need_at_most(model: Any) -> None:
    llm = make_llm(model, num_blocks=None, max_num_running=8)

    assert llm.engine.scheduler.manager.config.num_blocks == 8 * 128


def test_memory_that_is_not_there_is_refused_with_the_arithmetic(model: Any) -> None:
    with pytest.raises(MemoryBudgetError, match=r"kv_memory of 1048576.00 GiB does not fit: .* GiB are free"):
        make_llm(model, num_blocks=None, kv_memory="1024TiB")
    with pytest.raises(MemoryBudgetError, match="1000 bytes hold no block: one takes 2048 bytes"):
        make_llm(model, num_blocks=None, kv_memory=1000)
    with pytest.raises(InvalidArgumentError, match="share must be above 0 and at most 1, found 1"):
        make_llm(model, num_blocks=None, kv_memory=1.5)
    with pytest.raises(InvalidArgumentError, match="\"4GiB\", found '4 gigs'"):
        make_llm(model, num_blocks=None, kv_memory="4 gigs")
    with pytest.raises(ConfigError, match="say the same thing twice"):
        make_llm(model, kv_memory="1MiB")


@pytest.mark.parametrize("option", ["max_num_running", "max_num_batched_tokens"])
def test_limits_beside_a_scheduler_config_are_refused(model: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} and scheduler_config say the same thing twice: give one of them"):
        make_llm(model, scheduler_config=SchedulerConfig(64, 4), **{option: 4})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("drafter", "ngram", r"drafter must be an object such as NgramDrafter\(\), found 'ngram'"),
        ("drafter", NgramDrafter, r"drafter must be an object such as NgramDrafter\(\), found the class NgramDrafter"),
        (
            "tokenizer",
            "gpt2",
            r"tokenizer must be an object such as AutoTokenizer.from_pretrained\(name\), found 'gpt2'",
        ),
        ("timeline", 3, "timeline must be a path, found one of type int"),
        ("record", True, "record must be a path, found one of type bool"),
        ("clock", 3.0, r"clock must be a function such as time.monotonic, found one of type float"),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused(model: Any, option: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_llm(model, **{option: value})


def test_swapping_without_swap_memory_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="preemption Swap has no host memory to move to: give swap_memory"):
        make_llm(model, preemption=Swap())

    assert make_llm(model, preemption=Swap(), swap_memory="1MiB").engine.scheduler.manager.config.num_host_blocks > 0


@pytest.mark.usefixtures("no_meminfo")
@pytest.mark.parametrize("kv_memory", [4 * 2048, "8KiB"])
def test_memory_in_bytes_is_granted_where_the_system_does_not_tell_what_is_there(model: Any, kv_memory: Any) -> None:
    llm = make_llm(model, num_blocks=None, kv_memory=kv_memory)

    assert llm.engine.scheduler.manager.config.num_blocks == 4


@pytest.mark.usefixtures("no_meminfo")
@pytest.mark.parametrize("kv_memory", [None, 0.5])
def test_a_share_of_memory_that_the_system_does_not_tell_is_refused(model: Any, kv_memory: float | None) -> None:
    with pytest.raises(MemoryBudgetError, match="cannot be read on this system: give num_blocks or kv_memory in bytes"):
        make_llm(model, num_blocks=None, kv_memory=kv_memory)


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_a_quantised_cache_stays_near_the_models_own_tokens(model: Any, kv_dtype: str) -> None:
    exact = make_llm(model).generate(PROMPTS, SamplingParams(max_tokens=1, temperature=0, logprobs=0))
    quantised = make_llm(model, kv_dtype=kv_dtype).generate(
        PROMPTS, SamplingParams(max_tokens=1, temperature=0, logprobs=0)
    )

    differences = [
        abs(a.completions[0].logprobs[0].logprob - b.completions[0].logprobs[0].logprob)
        for a, b in zip(exact, quantised, strict=True)
    ]
    assert 0 < max(differences) < {"int8": 0.1, "float8_e4m3fn": 1.0, "float8_e5m2": 2.0, "int4": 2.0}[kv_dtype]


# Models


def tiny(config_name: str, model_name: str, **options: Any) -> Any:
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**options)).eval()


def test_an_encoder_decoder_is_refused_by_name() -> None:
    model = tiny(
        "T5Config", "T5ForConditionalGeneration", num_layers=1, d_model=16, d_ff=16, num_heads=2, vocab_size=32
    )

    with pytest.raises(
        UnsupportedModelError, match="T5ForConditionalGeneration cannot be served: it is an encoder-decoder"
    ):
        LLM(model)


def test_state_space_layers_are_refused_by_name() -> None:
    model = tiny("MambaConfig", "MambaForCausalLM", num_hidden_layers=1, hidden_size=16, state_size=4, vocab_size=32)

    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM cannot be served: it has layers of type 'linear"):
        LLM(model)


def test_attention_of_its_own_is_refused_by_name() -> None:
    model = tiny("MptConfig", "MptForCausalLM", n_layers=1, d_model=32, n_heads=2, vocab_size=32, max_seq_len=32)

    with pytest.raises(UnsupportedModelError, match="MptForCausalLM cannot be served"):
        LLM(model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear cannot be served: it is no causal language model"):
        LLM(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_model_that_computes_something_else_by_itself_is_found_out(model: Any) -> None:
    odd = make_model("llama", seed=1)
    layer = odd.model.layers[1].self_attn
    forward = type(layer).forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        if odd.config._attn_implementation != "pagedkv":
            kwargs["hidden_states"] = kwargs["hidden_states"] * 1.5
        return forward(layer, *args, **kwargs)

    layer.forward = shifted

    with pytest.raises(UnsupportedModelError, match="its logits differ from its own by"):
        LLM(odd, num_blocks=8)
