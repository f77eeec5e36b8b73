"""A small random Llama, and the ways in which transformers itself completes many prompts with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

VOCABULARY = 4096
PEER_PAGE = 32
Prompts = list[list[int]]
Tokens = list[list[int]]


def small_llama() -> Any:
    """4 layers, hidden size 256, 8 heads of 32 over 4 KV heads, float32, random weights; it never says that it has ended."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def random_prompts(num: int, shortest: int, longest: int, seed: int = 0) -> Prompts:
    """`num` prompts of random tokens, their lengths even over the range."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, rng.integers(shortest, longest + 1)).tolist() for _ in range(num)]


def padded_batch(model: Any, prompts: Prompts, num_new: int, on_step: Callable[[], None] | None = None) -> Tokens:
    """`generate` on one batch, the prompts padded on their left; `on_step` is called when the logits of a step are there."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def note(_ids: Tensor, scores: Tensor) -> Tensor:
        if on_step is not None:
            on_step()
        return scores

    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            logits_processor=transformers.LogitsProcessorList([note]),
        )
    tokens: Tokens = out[:, width:].tolist()
    return tokens


def one_by_one(model: Any, prompts: Prompts, num_new: int) -> Tokens:
    """`generate` on each prompt by itself."""
    return [padded_batch(model, [prompt], num_new)[0] for prompt in prompts]


def continuous_batch(model: Any, prompts: Prompts, num_new: int) -> Tokens:
    """`generate_batch`: transformers' own continuous batching."""
    config = transformers.GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # As many blocks as the prompts need: by default it takes most of the machine's memory, and clears it, on every call.
    num_blocks = 2 * sum(-(-(len(prompt) + num_new) // PEER_PAGE) for prompt in prompts)
    memory = transformers.ContinuousBatchingConfig(page_size=PEER_PAGE, num_blocks=num_blocks, max_batch_tokens=2048)
    outputs = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=memory, progress_bar=False
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]
