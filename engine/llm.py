"""LLM: a Hugging Face model, served with continuous batching."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pagedkv.arrays import Int32s, as_int, as_token_ids, shown
from pagedkv.engine.beam_search import BeamSearch, BeamSearchParams
from pagedkv.engine.building import build_engine, max_length_of
from pagedkv.engine.core import Engine
from pagedkv.engine.detokenizer import Detokenizer
from pagedkv.engine.errors import EngineClosedError
from pagedkv.engine.metrics import MetricsSnapshot
from pagedkv.engine.outputs import BeamOutput, Piece, RequestOutput
from pagedkv.engine.prompts import Message, TextOrTokens, as_conversations, as_messages, as_prompt, as_prompts
from pagedkv.engine.sampling_params import MAX_SEED, SamplingParams
from pagedkv.engine.speculation import Drafter
from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.eviction import EvictionPolicy
from pagedkv.scheduler import PreemptionPolicy, QueuePolicy, SchedulerConfig, VictimPolicy

__all__ = ["LLM", "Message", "TextOrTokens"]


class LLM:
    """A causal language model of transformers on paged K/V: prefix cache, chunked prefill, preemption, continuous batching.

    >>> llm = LLM(model, tokenizer)  # doctest: +SKIP
    >>> llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))[0].text  # doctest: +SKIP
    ' Paris.'

    The model stays the user's: between calls it is as it was, but in evaluation mode (`model.eval()`), and its weights are
    never copied. Not for several threads: AsyncLLM is.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: Any = None,
        *,
        num_blocks: int | None = None,
        block_size: int = 16,
        kv_memory: str | int | float | None = None,
        kv_dtype: str | None = None,
        swap_memory: str | int | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_running: int | None = None,
        scheduler_config: SchedulerConfig | None = None,
        prefix_caching: bool = True,
        eviction: EvictionPolicy | None = None,
        policy: QueuePolicy | None = None,
        victim: VictimPolicy | None = None,
        preemption: PreemptionPolicy | None = None,
        drafter: Drafter | None = None,
        self_check: bool = True,
        seed: int = 0,
        timeline: str | Path | None = None,
        record: str | Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the memory and get ready.

        model:       a model, or the name or folder of one, which is then loaded with its tokenizer
        tokenizer:   for texts; without it, prompts are token ids and outputs have no text
        num_blocks:  blocks of K/V; or else
        kv_memory:   bytes, "4GiB", or a float: the share of a GPU's memory that model and K/V may take together (0.9 if
                     nothing is said), or of a machine's available memory for K/V (0.25)
        kv_dtype:    "int8", "int4", "float8_e4m3fn", ...: a quantised cache; None: as the model
        swap_memory: host memory for swapping requests out; then preemption swaps, without it, it recomputes
        max_num_batched_tokens, max_num_running: of a step, 2048 and 256 if nothing is said; or a whole `scheduler_config`
        eviction, policy, victim, preemption: as KVCacheManager and Scheduler take them
        drafter:     guesses tokens that a step verifies: NgramDrafter() or DraftModelDrafter(small_model); the tokens are
                     those of plain decoding
        self_check:  compare the paged model's logits with its own once, on a short text
        seed:        of the requests that have none
        timeline:    a file for Perfetto, written as the engine runs: every step and every request
        record:      a folder for a run that `pagedkv fit` and `pagedkv replay` take; it holds lengths and times, no tokens
        clock:       seconds, never falling

        Raises UnsupportedModelError, ConfigError, MemoryBudgetError, InvalidArgumentError.
        """
        if scheduler_config is None:
            scheduler_config = SchedulerConfig(
                max_num_batched_tokens=2048 if max_num_batched_tokens is None else max_num_batched_tokens,
                max_num_running=256 if max_num_running is None else max_num_running,
            )
        elif max_num_batched_tokens is not None or max_num_running is not None:
            name = "max_num_running" if max_num_batched_tokens is None else "max_num_batched_tokens"
            raise ConfigError(f"{name} and scheduler_config say the same thing twice: give one of them")
        seed = as_int("seed", seed, at_least=0, at_most=MAX_SEED)
        if isinstance(model, str | Path):
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self._engine: Engine | None = build_engine(
            model,
            tokenizer,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_memory=kv_memory,
            kv_dtype=kv_dtype,
            swap_memory=swap_memory,
            scheduler_config=scheduler_config,
            prefix_caching=prefix_caching,
            eviction=eviction,
            policy=policy,
            victim=victim,
            preemption=preemption,
            drafter=drafter,
            self_check=self_check,
            seed=seed,
            timeline=timeline,
            record=record,
            clock=clock,
        )
        self.tokenizer = tokenizer
        self.max_length = max_length_of(model)
        self._num_added = 0

    # Generating

    def generate(
        self,
        prompts: TextOrTokens | Sequence[TextOrTokens],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: float = 0.0,
        salt: bytes = b"",
        client: str | int | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts, together; outputs come in the order of the prompts.

        prompts:  a text, token ids, a tokenizer's output, a tensor; or several
        params:   for all prompts, or one for each; SamplingParams() if None
        priority: of all of them, the lower the sooner; refused if no policy looks at it
        salt:     prompts of different salt share no cached blocks
        client:   whose share they take, if there are shares
        progress: whether a bar is shown; None: on a terminal, after two seconds

        Every argument is checked before anything is computed. Timings count from the call, tokenizing included.
        An interrupt aborts what is under way.
        """
        arrival_s = self.engine.clock()
        batch = as_prompts(prompts)
        each = _one_for_each(params, len(batch))
        checked = [self.check(prompt, given) for prompt, given in zip(batch, each, strict=True)]
        outputs: dict[str, RequestOutput] = {}
        ids: list[str] = []
        # A bar that a redirected output does not get: `disable=None`.
        bar = tqdm(total=len(batch), unit="request", delay=2, disable=None if progress is None else not progress)

        def keep(output: RequestOutput) -> None:
            outputs[output.request_id] = output
            bar.update()

        try:
            for prompt, (token_ids, given) in zip(batch, checked, strict=True):
                ids.append(self._next_id())
                text = prompt if isinstance(prompt, str) else None
                self.engine.add(
                    ids[-1],
                    token_ids,
                    given,
                    arrival_s=arrival_s,
                    prompt=text,
                    on_finish=keep,
                    priority=priority,
                    salt=salt,
                    client=client,
                )
            while len(outputs) < len(ids):
                self.engine.step()
        except BaseException:
            for request_id in ids:
                if self.engine.is_live(request_id):
                    self.engine.abort(request_id)
            raise
        finally:
            bar.close()
        return [outputs[request_id] for request_id in ids]

    def stream(
        self,
        prompt: TextOrTokens,
        params: SamplingParams | None = None,
        *,
        priority: float = 0.0,
        salt: bytes = b"",
        client: str | int | None = None,
    ) -> Iterator[Piece]:
        """Complete one prompt and yield pieces as they come. Closing the iterator early aborts the request.

        `priority`, `salt` and `client` are as in `generate`. Raises what ended the request, if it did not end by itself.
        """
        token_ids, params = self.check(prompt, params)
        text = prompt if isinstance(prompt, str) else None
        return self._stream(token_ids, params, prompt=text, priority=priority, salt=salt, client=client)

    def _stream(self, token_ids: Int32s, params: SamplingParams, **asked: Any) -> Iterator[Piece]:
        pieces: deque[Piece] = deque()
        ended: list[RequestOutput] = []
        request_id = self._next_id()
        self.engine.add(request_id, token_ids, params, on_piece=pieces.append, on_finish=ended.append, **asked)
        try:
            while not ended or pieces:
                while pieces:
                    yield pieces.popleft()
                if not ended:
                    self.engine.step()
        finally:
            if not ended:
                self.engine.abort(request_id)
        if ended[0].error is not None:
            raise ended[0].error

    def beam_search(
        self,
        prompts: TextOrTokens | Sequence[TextOrTokens],
        params: BeamSearchParams | None = None,
        *,
        salt: bytes = b"",
    ) -> list[list[BeamOutput]]:
        """For each prompt its `num_beams` likeliest texts, the best first, as `generate(num_beams=...)` finds them.

        Beams share blocks through forks and copy-on-write. Runs by itself, not among the requests of `generate`: it is in no
        metrics, timeline or record. Prompts of different `salt` share no cached blocks.
        """
        params = BeamSearchParams() if params is None else params
        if not isinstance(params, BeamSearchParams):
            raise InvalidArgumentError(f"params must be BeamSearchParams, found {shown(params)}")
        batch = as_prompts(prompts)
        limit = SamplingParams(max_tokens=params.max_tokens)
        token_ids = [self.prepare(prompt, limit)[0] for prompt in batch]
        engine = self.engine
        engine.require_owner()
        search = BeamSearch(
            engine.model,
            engine.scheduler.manager,
            engine.storage,
            max_num_batched_tokens=engine.scheduler.config.max_num_batched_tokens,
        )
        found = search.run(token_ids, params, engine.end_token_ids, salt=salt)
        return [
            [BeamOutput(beam.token_ids, self._decode(prompt, beam.token_ids), beam.score) for beam in beams]
            for prompt, beams in zip(token_ids, found, strict=True)
        ]

    def _decode(self, prompt: Int32s, token_ids: Sequence[int]) -> str | None:
        if self.tokenizer is None:
            return None
        detokenizer = Detokenizer(self.tokenizer, prompt.tolist())
        return detokenizer.push(token_ids) + detokenizer.finish()

    def chat(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: float = 0.0,
        salt: bytes = b"",
        client: str | int | None = None,
        progress: bool | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, by the tokenizer's chat template, which gets `template`.

        The other arguments are those of `generate`.
        """
        prompts = [self.chat_prompt(messages, **template) for messages in as_conversations(conversation)]
        return self.generate(prompts, params, priority=priority, salt=salt, client=client, progress=progress)

    def chat_prompt(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Token ids of a conversation that the model is to continue.

        Raises InvalidArgumentError without a template, and for what the template refuses.
        """
        if self.tokenizer is None or getattr(self.tokenizer, "chat_template", None) is None:
            raise InvalidArgumentError("chat needs a tokenizer with a chat template")
        listed = as_messages(messages)
        if taken := template.keys() & {"tokenize", "return_dict"}:
            raise InvalidArgumentError(f"{', '.join(sorted(taken))}: a chat's prompt is always token ids")
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False} | template
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(listed, **options)
        except Exception as error:  # Templates and tokenizers raise what they like of a caller's messages
            raise InvalidArgumentError(f"the chat template refuses these messages: {error}") from error
        return ids

    # Arguments

    def check(self, prompt: TextOrTokens, params: SamplingParams | None) -> tuple[Int32s, SamplingParams]:
        """The prompt's token ids, (n,) int32, and its parameters, after every check that needs no queue.

        Raises InvalidArgumentError, RequestTooLargeError.
        """
        token_ids, params = self.prepare(prompt, params)
        self.engine.limits.check_size(token_ids, params)
        return token_ids, params

    def prepare(self, prompt: TextOrTokens, params: SamplingParams | None) -> tuple[Int32s, SamplingParams]:
        """As `check`, but whether there is memory for it is left to `Engine.add`, whose refusals the metrics count."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidArgumentError(f"params must be SamplingParams, found {shown(params)}")
        plain = as_prompt(prompt)
        token_ids = as_token_ids("prompt", self._encode(plain) if isinstance(plain, str) else plain)
        limits = self.engine.limits
        limits.check_prompt(token_ids, params)
        limits.check_params(params)
        return token_ids, params

    def _encode(self, text: str) -> Sequence[int]:
        if self.tokenizer is None:
            raise InvalidArgumentError("a prompt that is a text needs a tokenizer: give LLM one, or token ids")
        try:
            return cast(Sequence[int], self.tokenizer(text)["input_ids"])
        except Exception as error:  # It may raise what it likes of a text, such as half a surrogate
            raise InvalidArgumentError(f"the tokenizer refuses a prompt: {error}") from error

    # The engine

    @property
    def engine(self) -> Engine:
        """The engine below, for those who want to drive it themselves. Raises EngineClosedError after `close`."""
        if self._engine is None:
            raise EngineClosedError("this LLM was closed")
        return self._engine

    def metrics(self) -> MetricsSnapshot:
        """Counters, gauges and histograms as they are now, by vLLM's names. O(buckets)."""
        return self.engine.metrics()

    def close(self) -> None:
        """End every live request and let go of the K/V memory. The model stays. Closing twice does nothing.

        Raises the error with which writing a timeline or a record ended; the engine is closed all the same. Raises
        EngineClosedError, with nothing done, while an AsyncLLM has it.
        """
        engine = self._engine
        if engine is not None:
            engine.require_owner()
            self._engine = None
            engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_id(self) -> str:
        self._num_added += 1
        return f"request-{self._num_added}"


def _one_for_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if isinstance(params, str) or not isinstance(params, Sequence):
        raise InvalidArgumentError(f"params must be SamplingParams, or one for each prompt, found {shown(params)}")
    if len(params) != num_prompts:
        raise InvalidArgumentError(f"{num_prompts} prompts need as many SamplingParams, or one, found {len(params)}")
    return list(params)
