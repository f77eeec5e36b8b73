"""A first look at LLM: a batch, a stream, a prefix that is computed once. Downloads nothing unless --model is given."""

import argparse
import time

import torch
from tiny_model import model_and_tokenizer

from pagedkv.engine import LLM, RequestOutput, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time,", "def fibonacci(n):", "The three laws of robotics are"]
MANUAL = "You answer questions about the manual below, in one sentence. " + 40 * "Press the green button, then wait. "
QUESTIONS = ["Which button is it?", "What comes after the button?", "How long is this manual?"]


def show(prompt: str, output: RequestOutput) -> None:
    """One line about one answer."""
    times = output.timings
    first_ms = 1e3 * (times.ttft_s or 0)
    print(f"  {prompt[:32]:<32} {output.text!r:.44}")
    print(
        f"{'':35}{len(output.prompt_token_ids)} prompt tokens ({times.num_cached_tokens} cached), "
        f"{len(output.token_ids)} new, first after {first_ms:.0f} ms, all after {1e3 * times.e2e_s:.0f} ms"
    )


def batch(llm: LLM, params: SamplingParams) -> None:
    """Several prompts at once: each step computes a token for all of them."""
    print(f"A batch of {len(PROMPTS)} prompts")
    start = time.perf_counter()
    outputs = llm.generate(PROMPTS, params)
    elapsed = time.perf_counter() - start
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        show(prompt, output)
    num_new = sum(len(output.token_ids) for output in outputs)
    print(f"  {num_new} tokens in {elapsed:.2f} s: {num_new / elapsed:.0f} a second\n")


def stream(llm: LLM, params: SamplingParams) -> None:
    """Text as it comes."""
    print(f"A stream\n  {PROMPTS[0]} ...", end="", flush=True)
    for piece in llm.stream(PROMPTS[0], params):
        print(piece.text, end="", flush=True)
    print("\n")


def shared_prefix(llm: LLM, params: SamplingParams) -> None:
    """Prompts that begin alike: the K/V of what they share is computed for the first, and found by the others."""
    print("Three questions about one manual, one after the other")
    for question in QUESTIONS:
        show(question, llm.generate(f"{MANUAL}\n{question}\n", params)[0])
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="name or folder of a model of transformers; none: a tiny random one, whose text is noise"
    )
    parser.add_argument("--max-tokens", type=int, default=32, help="new tokens for each prompt (32)")
    options = parser.parse_args()
    greedy = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    print("A tiny Llama with random weights: its text is noise.\n" if options.model is None else f"{options.model}\n")
    if options.model is None:
        torch.set_num_threads(1)  # Its products are so small that several threads mostly wait for each other.
    with LLM(*model_and_tokenizer(options.model)) as llm:
        batch(llm, greedy)
        stream(llm, greedy)
        shared_prefix(llm, greedy)
        metrics = llm.metrics()
        blocks = llm.engine.scheduler.manager.statistics()
    print(f"In all: {metrics.prompt_tokens} prompt tokens, {metrics.generation_tokens} new tokens.")
    print(
        f"Prefix cache: {metrics.prefix_cache_hits} of {metrics.prefix_cache_queries} prompt tokens were there already."
    )
    print(
        f"K/V memory: {blocks.num_used} of {blocks.num_blocks} blocks in use, {blocks.num_evictable} kept for later prompts."
    )
