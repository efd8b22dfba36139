"""Requests that come while others run, as in a server: they share steps, one goes first, and one is given up.

python examples/serve_many.py ENGINE
"""

import asyncio
import contextlib
import sys

from seekforge import AsyncLLM, SamplingParams


async def ask(llm: AsyncLLM, name: str, prompt: str, *, priority: int = 0) -> None:
    output = await llm.generate(prompt, SamplingParams(max_tokens=24, temperature=0), priority=priority)
    print(f"{name}: {len(output.outputs[0].token_ids)} tokens after {output.metrics.queue_s:.3f} s of waiting")


async def give_up(llm: AsyncLLM, prompt: str) -> None:
    """Stop reading after a few tokens: closing the stream ends the request, and frees its cache."""
    count = 0
    async with contextlib.aclosing(llm.stream(prompt, SamplingParams(max_tokens=200, ignore_eos=True))) as deltas:
        async for delta in deltas:
            count += len(delta.token_ids)
            if count >= 4:
                break
    print(f"given up: after {count} of 200 tokens")


async def serve(engine: str) -> None:
    async with AsyncLLM(engine, max_batch_size=4, max_waiting=100) as llm:
        async with asyncio.TaskGroup() as requests:
            for number in range(6):
                requests.create_task(ask(llm, f"request {number}", f"Question {number}"))
            requests.create_task(ask(llm, "urgent", "Now", priority=-1))
            requests.create_task(give_up(llm, "A long story"))
        metrics = llm.llm.metrics()
        print(f"running {metrics.num_running}, waiting {metrics.num_waiting}")


def main(engine: str) -> None:
    asyncio.run(serve(engine))


if __name__ == "__main__":
    main(*sys.argv[1:])
