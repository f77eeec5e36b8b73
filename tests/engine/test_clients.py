"""One client floods the engine, and another does not notice: `client` reaches the scheduler's shares from every way in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from families import make_model

from pagedkv.engine import LLM, AsyncLLM, RequestOutput, SamplingParams
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler import QueueFullError, SchedulerConfig

MODEL = make_model("llama")
PROMPT = [1, 2, 3, 4, 5]
FIVE = SamplingParams(temperature=0, max_tokens=5)


def make_llm(share: float | None, **limits: Any) -> LLM:
    """Two seats."""
    config = SchedulerConfig(64, 2, client_share=share, watermark=0, **limits)
    return LLM(MODEL, num_blocks=16, block_size=4, self_check=False, scheduler_config=config)


def order_of_ends(llm: LLM, clients: list[str]) -> list[str]:
    """In which order requests of these clients end that are there from the start."""
    ended: list[str] = []
    for i, client in enumerate(clients):
        llm.engine.add(
            f"{client}{i}",
            *llm.check(PROMPT, FIVE),
            client=client,
            on_finish=lambda out: ended.append(out.request_id[0]),
        )
    while llm.engine.has_work:
        llm.engine.step()
    llm.close()
    return ended


def test_with_shares_a_client_does_not_wait_for_what_another_floods() -> None:
    clients = ["a"] * 6 + ["b"]

    assert order_of_ends(make_llm(0.5), clients).index("b") <= 1
    assert order_of_ends(make_llm(None), clients).index("b") == 6


def test_a_client_takes_its_share_of_the_places_to_wait_and_no_more() -> None:
    with make_llm(0.5, max_num_waiting=4) as llm:
        arguments = llm.check(PROMPT, FIVE)
        for name in ("a1", "a2"):
            llm.engine.add(name, *arguments, client="a", on_finish=lambda _: None)
        with pytest.raises(QueueFullError, match="2 requests of its client are here"):
            llm.engine.add("a3", *arguments, client="a", on_finish=lambda _: None)

        assert not llm.engine.is_live("a3")
        llm.engine.add("a3", *arguments, client="b", on_finish=lambda _: None)


def test_asynchronous_callers_share_alike() -> None:
    async def main() -> list[str]:
        ended: list[str] = []
        async with AsyncLLM(make_llm(0.5)) as engine:

            async def ask(client: str) -> RequestOutput:
                output = await engine.generate(PROMPT, FIVE, client=client)
                ended.append(client)
                return output

            flood = [asyncio.create_task(ask("a")) for _ in range(8)]
            quiet = asyncio.create_task(ask("b"))
            await asyncio.gather(*flood, quiet)
            assert [piece.token_ids async for piece in engine.stream(PROMPT, FIVE, client="b")]
            with pytest.raises(InvalidArgumentError, match="client must be"):
                await engine.generate(PROMPT, FIVE, client=1.5)  # type: ignore[arg-type]
        return ended

    # How many of the flood are done before the quiet one is there depends on the threads, not so many as without shares.
    assert asyncio.run(asyncio.wait_for(main(), 120)).index("b") < 8


def test_a_recorded_run_numbers_the_clients(tmp_path: Path) -> None:
    llm = LLM(MODEL, num_blocks=16, block_size=4, self_check=False, record=tmp_path / "run")
    for name, client in (("1", "somebody"), ("2", None), ("3", "somebody"), ("4", 0)):
        llm.engine.add(name, *llm.check(PROMPT, FIVE), client=client, on_finish=lambda _: None)
    while llm.engine.has_work:
        llm.engine.step()
    llm.close()

    lines = (tmp_path / "run" / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["client"] for line in lines] == [0, 1, 0, 2]
    assert "somebody" not in (tmp_path / "run" / "trace.jsonl").read_text()
