"""A chat in the terminal. Ctrl-C cuts an answer short, Ctrl-D ends. The prefix cache has each turn's history already."""

import argparse

import torch
from tiny_model import model_and_tokenizer

from pagedkv.engine import LLM, SamplingParams
from pagedkv.errors import InvalidArgumentError


def answer(llm: LLM, history: list[dict[str, str]], params: SamplingParams) -> str:
    """Print the answer as it comes, and return it; an interrupt cuts it short and aborts its request."""
    text = ""
    pieces = llm.stream(llm.chat_prompt(history), params)
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            text += piece.text
    except KeyboardInterrupt:
        print(" [cut short]", end="")
    finally:
        pieces.close()
    print()
    return text


def chat(llm: LLM, system: str | None, params: SamplingParams) -> None:
    """Question and answer in turn, until the input ends."""
    history = [] if system is None else [{"role": "system", "content": system}]
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            question = ""
        except EOFError:
            print()
            return
        if not question:
            continue
        before = llm.metrics()
        history.append({"role": "user", "content": question})
        try:
            history.append({"role": "assistant", "content": answer(llm, history, params)})
        except InvalidArgumentError as error:  # The conversation has outgrown the model or the memory.
            print(f"[{error}]")
            history.pop()
            continue
        after = llm.metrics()
        num_prompt = after.prefix_cache_queries - before.prefix_cache_queries
        print(f"[{num_prompt} prompt tokens, {after.prefix_cache_hits - before.prefix_cache_hits} of them cached]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="name or folder of a model of transformers; none: a tiny random one, whose text is noise"
    )
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=256, help="of one answer (256)")
    options = parser.parse_args()
    sampling = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    if options.model is None:
        torch.set_num_threads(1)  # Its products are so small that several threads mostly wait for each other.
    with LLM(*model_and_tokenizer(options.model)) as llm:
        chat(llm, options.system, sampling)
