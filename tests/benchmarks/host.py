"""What the runtime itself costs: a script, not a test. `python -m tests.benchmarks.host [--soak]`

Prints the time of one decode step on a backend that does nothing (schedule, pack, sample, commit), for greedy and for
the model's default sampling; the time of one plan of 256 requests; and with --soak what memory 100,000 requests leave.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

from seekforge.runtime.backends.null import FixedBackend
from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.engine.core import Core
from seekforge.runtime.engine.kv_cache import BlockPool, KvCache
from seekforge.runtime.engine.scheduler import Scheduler
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.sequence import Sequence

VOCAB, TOP, BLOCK = 129_280, 256, 64


def make(batch: int, num_blocks: int) -> Core:
    """A core whose backend is free."""
    scheduler = Scheduler(
        KvCache(BlockPool(num_blocks), BLOCK),
        max_batch_size=batch,
        max_num_batched_tokens=max(8192, batch),
        max_model_len=100_000,
    )
    return Core(FixedBackend(VOCAB, TOP), scheduler, VOCAB)


def decoding(batch: int, params: SamplingParams) -> Core:
    """A core with `batch` requests whose prompts are done."""
    core = make(batch, 40 * batch + 1)
    for number in range(batch):
        core.scheduler.add(Sequence(number, tuple(range(100)), params, seed=number, table=BlockTable(b"%d" % number)))
    while any(not s.output_ids for s in core.scheduler.running) or core.scheduler.num_waiting:
        core.step()
    return core


def times_ms(call, count: int) -> tuple[float, float]:
    """Median time of `call`, garbage collection included as it comes; and its tenth percentile, which others who use
    the machine disturb least."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3, statistics.quantiles(times, n=10)[0] * 1e3


def host_overhead() -> dict[str, dict[int, tuple[float, float]]]:
    """Milliseconds per decode step (`times_ms`), by kind of sampling and batch."""
    kinds = {
        "greedy": SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True),
        "temperature 1, top-p 0.95": SamplingParams(temperature=1, top_p=0.95, max_tokens=2000, ignore_eos=True),
        "the same with a presence penalty": SamplingParams(
            temperature=1, top_p=0.95, presence_penalty=0.5, max_tokens=2000, ignore_eos=True
        ),
        "the same with a bias on three tokens": SamplingParams(
            temperature=1, top_p=0.95, logit_bias={5: -3.0, 77: 2.0, 1000: 1.0}, max_tokens=2000, ignore_eos=True
        ),
    }
    return {
        name: {batch: times_ms(decoding(batch, params).step, 100) for batch in (1, 64, 256)}
        for name, params in kinds.items()
    }


def plan_ms() -> tuple[float, float]:
    """Milliseconds of one plan of 256 decoding requests (`times_ms`)."""
    core = decoding(256, SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True))
    return times_ms(core.scheduler.schedule, 100)


def soak(count: int) -> dict[str, float]:
    """Run many short requests, some cancelled; return memory at a tenth and at the end, in MB."""
    core = make(64, 200)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    memory: dict[str, float] = {}
    began = time.perf_counter()
    for number in range(count):
        prompt = tuple((number * 7 + i) % 5000 for i in range(20 + number % 90))
        sequence = Sequence(number, prompt, params, table=BlockTable(b"root"), deadline_s=time.monotonic() + 3600)
        core.scheduler.add(sequence)
        if number % 13 == 0:
            core.scheduler.abort(sequence)
        while core.scheduler.num_waiting > 100:
            core.step()
        if number == count // 10:
            memory["MB at a tenth"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    while core.scheduler.has_work:
        core.step()
    core.scheduler.check()
    assert core.scheduler.cache.pool.num_free == core.scheduler.cache.pool.num_usable
    memory["MB at the end"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory["seconds"] = time.perf_counter() - began
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true", help="also run 100,000 requests")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # the soak goes first: what it leaves is read from the largest memory that the process ever had
    result = {"soak_100000": soak(100_000)} if arguments.soak else {}
    result |= {"step_ms": host_overhead(), "plan_256_ms": plan_ms()}
    if arguments.json:
        print(json.dumps(result))
        return
    print("host time of a decode step, ms: median / tenth percentile at batch 1, 64, 256 (aim 0.1, 0.4, 1.2)")
    for name, row in result["step_ms"].items():
        print(f"  {name:<38}" + "".join(f"{median:9.3f} /{least:7.3f}" for median, least in row.values()))
    print("plan of 256 requests: {:.3f} / {:.3f} ms (aim 0.5)".format(*result["plan_256_ms"]))
    if arguments.soak:
        print("soak of 100,000 requests:", ", ".join(f"{k} {v:.0f}" for k, v in result["soak_100000"].items()))


if __name__ == "__main__":
    main()
