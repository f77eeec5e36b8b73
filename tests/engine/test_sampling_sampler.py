"""A token depends on its row's logits, parameters, seed and position; nothing else in the batch can touch it."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from pagedkv.engine.sampling import BadLogitsError, Sampler, seed_for
from pagedkv.engine.sampling import sampler as sampler_module
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidArgumentError

GREEDY = SamplingParams(temperature=0)


def seat(sampler: Sampler, row: int, params: SamplingParams, *, seed=0, prompt=(0,), output=(), ends=()) -> None:
    known = np.array([*prompt, *output], np.int32)
    sampler.seat(row, params, seed=seed, num_prompt=len(prompt), known_token_ids=known, end_token_ids=ends)


def sampler_with(*params: SamplingParams, vocab_size: int = 4, ends=()) -> Sampler:
    sampler = Sampler(vocab_size)
    for row, each in enumerate(params):
        seat(sampler, row, each, seed=row, ends=ends)
    return sampler


def tokens_of(sampler: Sampler, logits, rows, num_outputs=0) -> list[int]:
    rows = np.asarray(rows)
    logits = logits if isinstance(logits, torch.Tensor) else torch.tensor(logits)
    sampled = sampler.sample(logits, rows, np.broadcast_to(num_outputs, rows.shape))
    assert sampled.errors == {}
    assert sampled.logprobs is None or any(sampled.logprobs)  # None rather than a row of them.
    assert sampled.token_ids.dtype == np.int32
    return sampled.token_ids.tolist()


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_zero_temperature_takes_the_first_of_the_likeliest_tokens(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0, 5, 5, 1], [-1, -2, -3, -1]], dtype=dtype)

    assert tokens_of(sampler_with(GREEDY, GREEDY), logits, [0, 1]) == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_greedy_row_takes_the_same_token_whatever_else_it_needs(dtype: torch.dtype) -> None:
    logits = (torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 2).round().to(dtype)
    plain = sampler_with(*[GREEDY] * 50, vocab_size=30)
    reporting = sampler_with(*[SamplingParams(temperature=0, logprobs=0)] * 50, vocab_size=30)

    assert tokens_of(plain, logits, range(50)) == tokens_of(reporting, logits, range(50))


def test_a_step_without_rows_samples_nothing() -> None:
    assert tokens_of(sampler_with(GREEDY), torch.empty(0, 4), np.empty(0, np.int64)) == []


# Chance


def test_tokens_come_up_as_often_as_they_are_likely() -> None:
    sampler = sampler_with(SamplingParams(temperature=1.0))
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    logits = torch.from_numpy(np.log(shares)).float().repeat(20_000, 1)

    tokens = tokens_of(sampler, logits, np.zeros(20_000, int), np.arange(20_000))

    chi_square = ((np.bincount(tokens) - 20_000 * shares) ** 2 / (20_000 * shares)).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: 0.1 % lie above


def test_temperature_and_filters_shape_what_comes_up() -> None:
    sampler = sampler_with(SamplingParams(temperature=0.5, top_k=3))
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(20_000, 1)
    shares = np.array([0.04, 0.09, 0.16]) / 0.29  # Squares of 0.2, 0.3, 0.4.

    tokens = tokens_of(sampler, logits, np.zeros(20_000, int), np.arange(20_000))

    counts = np.bincount(tokens, minlength=4)
    assert counts[0] == 0
    assert ((counts[1:] - 20_000 * shares) ** 2 / (20_000 * shares)).sum() < 13.8  # 2 degrees of freedom: 0.1 %


def mixed_params() -> list[SamplingParams]:
    return [
        SamplingParams(),
        GREEDY,
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(top_k=5),
        SamplingParams(temperature=1.3, min_p=0.1, logprobs=3),
        SamplingParams(temperature=0, logprobs=1),
        SamplingParams(frequency_penalty=1.0, repetition_penalty=1.2),
        SamplingParams(temperature=0, presence_penalty=3.0),
        SamplingParams(min_tokens=9, top_p=0.5),
        SamplingParams(logits_processor=lambda known, logits: logits.roll(len(known))),
        SamplingParams(temperature=2.0, top_k=20, top_p=0.8, min_p=0.01),
        SamplingParams(temperature=0, min_tokens=3),
    ]


@pytest.mark.parametrize("part_elements", [2**24, 500])
def test_a_token_does_not_depend_on_the_batch(part_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "MAX_PART_ELEMENTS", part_elements)
    params = mixed_params() * 4
    sampler = Sampler(100)
    for row, each in enumerate(params):
        seat(sampler, row, each, seed=row, prompt=(1, 2, 3), output=(4, 4), ends=(7,))
    logits = 3 * torch.randn(len(params), 100, generator=torch.Generator().manual_seed(4))
    order = np.random.default_rng(0).permutation(len(params))

    together = np.array(tokens_of(sampler, logits, range(len(params)), 2))
    shuffled = tokens_of(sampler, logits[order], order, 2)
    alone = [tokens_of(sampler, logits[row : row + 1], [row], 2)[0] for row in range(len(params))]

    assert shuffled == together[order].tolist()
    assert alone == together.tolist()


def test_a_token_does_not_depend_on_preemption_or_on_the_row() -> None:
    params = SamplingParams(temperature=1.5, frequency_penalty=0.7, repetition_penalty=1.1, logprobs=2)
    logits = 2 * torch.randn(12, 50, generator=torch.Generator().manual_seed(5))
    undisturbed, output = Sampler(50), []
    seat(undisturbed, 0, params, seed=77, prompt=(3, 4))
    for position in range(12):
        output += tokens_of(undisturbed, logits[position : position + 1], [0], position)
        undisturbed.accept(np.array([0]), np.array(output[-1:], np.int32))

    resumed = Sampler(50)
    for position in range(12):
        seat(resumed, position, params, seed=77, prompt=(3, 4), output=output[:position])
        assert tokens_of(resumed, logits[position : position + 1], [position], position) == [output[position]]


def test_speculated_positions_of_a_row_get_the_tokens_that_it_would_get_one_by_one() -> None:
    sampler = sampler_with(SamplingParams(temperature=1.5, top_p=0.95), SamplingParams(), vocab_size=50)
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(6))

    one_by_one = [tokens_of(sampler, logits[i : i + 1], [0], i)[0] for i in range(8)]

    assert tokens_of(sampler, logits, np.zeros(8, int), np.arange(8)) == one_by_one


def test_other_seeds_and_other_samples_give_other_tokens() -> None:
    sampler = Sampler(1000)
    seeds = [5, 6, seed_for(5, 0), seed_for(5, 1)]
    for row, seed in enumerate(seeds):
        seat(sampler, row, SamplingParams(), seed=seed)
    logits = torch.zeros(20, 1000)

    streams = {tuple(tokens_of(sampler, logits, np.full(20, row), np.arange(20))) for row in range(4)}

    assert len(streams) == 4


def test_a_row_that_is_reused_forgets_the_sample_before() -> None:
    sampler = sampler_with(SamplingParams(presence_penalty=50.0, min_tokens=5, logprobs=3), ends=(2,))
    sampler.accept(np.array([0]), np.array([3], np.int32))
    seat(sampler, 0, GREEDY)

    sampled = sampler.sample(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), np.array([0]), np.array([0]))

    assert sampled.token_ids.tolist() == [3]
    assert sampled.logprobs is None


def test_a_row_that_is_reused_lets_go_of_the_processor_before() -> None:
    def processor(known, logits):
        return logits

    sampler = sampler_with(SamplingParams(logits_processor=processor))
    reference = weakref.ref(processor)
    del processor

    seat(sampler, 0, GREEDY)

    assert reference() is None


def test_rows_may_be_far_apart() -> None:
    sampler = Sampler(4)
    seat(sampler, 5000, GREEDY)

    assert tokens_of(sampler, [[0.0, 1.0, 0.0, 0.0]], [5000]) == [1]


# Ends, penalties, processors


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_a_sample_cannot_end_before_its_least_number_of_tokens(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=2, max_tokens=9)
    sampler = sampler_with(params, SamplingParams(temperature=0), ends=(1, 3, 99))
    logits = torch.tensor([[0.0, 90.0, 1.0, 80.0], [0.0, 90.0, 1.0, 80.0]])

    chosen = [tokens_of(sampler, logits, [0, 1], position) for position in range(4)]

    assert all(first in (0, 2) for first, _ in chosen[:2])
    assert chosen[2:] == [[1, 1], [1, 1]]
    assert [second for _, second in chosen] == [1, 1, 1, 1]


def test_a_processor_cannot_end_a_sample_before_its_least_number_of_tokens() -> None:
    def likes_ends(known, logits):
        assert logits.isinf().any() == (len(known) < 3)  # It sees what is forbidden.
        return torch.tensor([0.0, 90.0, 1.0, 80.0])

    params = SamplingParams(temperature=0, min_tokens=2, max_tokens=9, logits_processor=likes_ends)
    sampler = sampler_with(params, GREEDY, ends=(1, 3))
    chosen = []
    for position in range(3):
        tokens = tokens_of(sampler, torch.ones(2, 4), [0, 1], position)
        sampler.accept(np.array([0, 1]), np.array(tokens, np.int32))
        chosen.append(tokens[0])

    assert chosen == [2, 2, 1]


def test_a_least_number_of_tokens_without_end_tokens_changes_nothing() -> None:
    assert tokens_of(sampler_with(SamplingParams(temperature=0, min_tokens=3)), [[0.0, 1.0, 0.0, 0.0]], [0]) == [1]


@pytest.mark.parametrize("temperature", [0, 0.1])
def test_a_bias_makes_a_token_likelier_and_what_is_not_allowed_is_never_chosen(temperature: float) -> None:
    likelier = SamplingParams(temperature=temperature, logit_bias={2: 50})
    less_likely = SamplingParams(temperature=temperature, logit_bias={0: -100, 1: -100})
    allowed = SamplingParams(temperature=temperature, allowed_token_ids=[3, 3], logit_bias={0: 100})
    sampler = sampler_with(likelier, SamplingParams(temperature=temperature), less_likely, allowed)
    logits = torch.tensor([[40.0, 20.0, 0.0, 10.0]] * 4)

    assert tokens_of(sampler, logits, [0, 1, 2, 3]) == [2, 0, 3, 3]
    seat(sampler, 3, SamplingParams(temperature=temperature))
    assert tokens_of(sampler, logits[:1], [3]) == [0]


def test_a_bias_comes_before_penalties_and_the_processor() -> None:
    seen = []
    params = SamplingParams(
        temperature=0,
        logit_bias={1: 3},
        repetition_penalty=2.0,
        logits_processor=lambda known, logits: (seen.append(logits.tolist()), logits)[1],
    )
    sampler = Sampler(4)
    seat(sampler, 0, params, prompt=(1,))

    tokens_of(sampler, torch.ones(1, 4), [0])

    assert seen == [[1.0, 2.0, 1.0, 1.0]]


def test_accepted_tokens_are_penalised() -> None:
    sampler = sampler_with(SamplingParams(temperature=0, presence_penalty=2.0), GREEDY)
    logits = torch.tensor([[3.0, 2.5, 2.0, 1.5]] * 2)

    chosen = []
    for position in range(3):
        tokens = tokens_of(sampler, logits, [0, 1], position)
        sampler.accept(np.array([0, 1]), np.array(tokens, np.int32))
        chosen.append(tokens)

    assert chosen == [[0, 0], [1, 0], [2, 0]]


def test_a_token_that_was_not_accepted_is_missed() -> None:
    sampler = sampler_with(SamplingParams(temperature=0, presence_penalty=2.0))

    with pytest.raises(InvalidArgumentError, match="row 0 is at token 1 of its output, but 0 were accepted"):
        sampler.sample(torch.zeros(1, 4), np.array([0]), np.array([1]))


def test_a_processor_gets_the_known_tokens_and_float32_logits_after_penalties() -> None:
    seen = []

    def processor(known, logits):
        seen.append((known.tolist(), known.dtype, logits.tolist(), logits.dtype))
        return torch.tensor([0.0, 0.0, 9.0, 0.0])

    sampler = Sampler(4)
    seat(sampler, 0, SamplingParams(temperature=0.1, presence_penalty=1.0, logits_processor=processor), output=(1,))

    assert tokens_of(sampler, torch.ones(1, 4, dtype=torch.bfloat16), [0], 1) == [2]
    assert seen == [([0, 1], np.int32, [1.0, 0.0, 1.0, 1.0], torch.float32)]


def test_a_processor_may_keep_the_logits_that_it_saw() -> None:
    seen = []

    def processor(known, logits):
        seen.append(logits)
        return logits

    sampler = sampler_with(SamplingParams(temperature=0.5, logits_processor=processor))

    tokens_of(sampler, [[1.0, 2.0, 3.0, 4.0]], [0])

    assert seen[0].tolist() == [1.0, 2.0, 3.0, 4.0]


# Errors


def raising(known, logits):
    logits.fill_(torch.nan)
    raise RuntimeError("grammar")


@pytest.mark.parametrize(
    ("params", "logits", "message"),
    [
        (GREEDY, [0.0, torch.nan, 0.0, 0.0], "1 of 4 logits are not a number"),
        (GREEDY, [-torch.inf] * 4, "all 4 logits are -inf"),
        (GREEDY, [0.0, torch.inf, 0.0, 0.0], "a logit is infinite"),
        (SamplingParams(), [0.0, torch.nan, 0.0, 0.0], "1 of 4 logits are not a number"),
        (SamplingParams(top_p=0.5, top_k=2, min_p=0.1), [torch.nan] * 4, "4 of 4 logits are not a number"),
        (SamplingParams(top_p=0.5, logprobs=2), [-torch.inf] * 4, "all 4 logits are -inf"),
        (SamplingParams(top_k=2), [0.0, torch.inf, 0.0, 0.0], "a logit is infinite"),
        (SamplingParams(presence_penalty=1.0), [0.0, 0.0, torch.nan, 0.0], "1 of 4 logits are not a number"),
        (SamplingParams(min_tokens=1), [-torch.inf, 0.0, -torch.inf, -torch.inf], "leave no token with a finite logit"),
        (SamplingParams(logits_processor=lambda known, logits: logits * torch.nan), [0.0] * 4, "leave no token"),
        (
            SamplingParams(logits_processor=lambda known, logits: logits[:2]),
            [0.0] * 4,
            r"shape \(4,\), found torch.float32 \(2,\)",
        ),
        (SamplingParams(logits_processor=lambda known, logits: None), [0.0] * 4, r"shape \(4,\), found NoneType"),
        (
            SamplingParams(logits_processor=lambda known, logits: logits > 0),
            [0.0] * 4,
            "of floats .*, found torch.bool",
        ),
        (SamplingParams(logits_processor=lambda known, logits: logits.to_sparse()), [0.0] * 4, "sparse"),
        (SamplingParams(logits_processor=raising), [0.0] * 4, "grammar"),
        (SamplingParams(logits_processor=raising, temperature=0, logprobs=1), [0.0] * 4, "grammar"),
    ],
)
def test_a_row_that_fails_does_not_disturb_the_others(
    params: SamplingParams, logits: list[float], message: str
) -> None:
    others = [SamplingParams(top_p=0.9), GREEDY, SamplingParams(logprobs=1), SamplingParams(presence_penalty=1.0)]
    healthy = torch.randn(4, 4, generator=torch.Generator().manual_seed(8))
    sampler = sampler_with(*others, params, ends=(1,))
    expected = tokens_of(sampler, healthy, range(4))

    sampled = sampler.sample(torch.cat((healthy, torch.tensor([logits]))), np.arange(5), np.zeros(5, np.int64))

    assert sampled.token_ids.tolist() == [*expected, 0]
    assert list(sampled.errors) == [4]
    with pytest.raises((BadLogitsError, RuntimeError), match=message):
        raise sampled.errors[4]
    assert sampled.logprobs is not None
    assert [entry is not None for entry in sampled.logprobs] == [False, False, True, False, False]


def test_a_greedy_step_names_the_rows_that_fail() -> None:
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [1.0, 0.0]], dtype=torch.bfloat16)

    for dtype in (torch.bfloat16, torch.float32):
        sampled = sampler_with(GREEDY, GREEDY, GREEDY, vocab_size=2).sample(
            logits.to(dtype), np.arange(3), np.zeros(3, np.int64)
        )
        assert sampled.token_ids.tolist() == [1, 0, 0]
        assert list(sampled.errors) == [1]


def test_the_logits_are_left_as_they_are() -> None:
    params = mixed_params()
    sampler = sampler_with(*params, vocab_size=30, ends=(3,))
    logits = torch.randn(len(params), 30, generator=torch.Generator().manual_seed(9))
    before = logits.clone()

    tokens_of(sampler, logits, range(len(params)))

    assert torch.equal(logits, before)


def test_logits_of_the_wrong_shape_are_refused() -> None:
    sampler = sampler_with(GREEDY)

    with pytest.raises(InvalidArgumentError, match=r"need logits \(1, 4\), found \(1, 5\)"):
        sampler.sample(torch.zeros(1, 5), np.array([0]), np.array([0]))
    with pytest.raises(InvalidArgumentError, match="1 rows and 2 positions"):
        sampler.sample(torch.zeros(1, 4), np.array([0]), np.array([0, 0]))


@pytest.mark.parametrize("row", [1, 63, 64, 10_000])
def test_a_row_without_a_sample_is_refused(row: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"no sample is seated in row {row}"):
        sampler_with(GREEDY).sample(torch.zeros(2, 4), np.array([0, row]), np.array([0, 0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_chooses_the_tokens_that_a_cpu_chooses() -> None:
    """But for a rounding of the exponential that falls between two tokens, which these logits have not."""
    params = mixed_params() * 8
    sampler = Sampler(1000)
    for row, each in enumerate(params):
        seat(sampler, row, each, seed=row, prompt=(1, 2, 3), output=(4, 4), ends=(7,))
    logits = 3 * torch.randn(len(params), 1000, generator=torch.Generator().manual_seed(4))

    on_gpu = tokens_of(sampler, logits.cuda(), range(len(params)), 2)

    assert on_gpu == tokens_of(sampler, logits, range(len(params)), 2)


def test_a_seat_that_is_refused_leaves_the_row_as_it_was() -> None:
    sampler = sampler_with(GREEDY)

    with pytest.raises(InvalidArgumentError, match="logprobs 5 exceeds the vocabulary of 4 tokens"):
        seat(sampler, 0, SamplingParams(logprobs=5))
    with pytest.raises(InvalidArgumentError, match=r"num_prompt must be in 0..1, found 2"):
        sampler.seat(0, SamplingParams(presence_penalty=1.0), seed=0, num_prompt=2, known_token_ids=np.array([1]))
    with pytest.raises(InvalidArgumentError, match="seed must be in"):
        seat(sampler, 0, SamplingParams(), seed=-1)
    with pytest.raises(InvalidArgumentError, match="row must be in"):
        seat(sampler, -1, GREEDY)

    assert tokens_of(sampler, [[0.0, 1.0, 0.0, 0.0]], [0]) == [1]
