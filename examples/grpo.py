"""Teach `nano` differences by GRPO: it samples, what is right is made likelier, and it samples again.

It knows how a difference is thought out, and some of the digits. A reward is half the share of right lines in the
thought, and half the answer. The compiled engine samples and gets the trainer's weights after each step, without
being built again. What its router and indexer chose is replayed by the trainer, so that both have the same
log-probabilities (docs/rl.md). ENGINE is one of exact numerics, CHECKPOINT what it was built from; --chart needs the
extra `charts`, the rest `train`.

    python examples/grpo.py ENGINE CHECKPOINT --steps 80 --chart curve.svg --log log.jsonl
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seekforge import LLM, SamplingParams
from seekforge.common.cli.charts import write_figure
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.rl.grpo import GrpoSettings, group_advantages, grpo_loss
from seekforge.exporter.training.rl.policy import Policy
from seekforge.exporter.training.rl.rollouts import RolloutBatch, token_logprobs
from seekforge.exporter.training.tasks import difference_thought, is_held_out, sum_thought
from seekforge.exporter.training.weights import read_weights
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.runtime.rollout import Rollout, RolloutEngine

#: Rollouts that go through the trainer at a time, and those of one update of the weights.
ROWS, UPDATE_ROWS = 16, 256


def main() -> None:
    options = read_options()
    model, reference = (read_model(options.checkpoint) for _ in range(2))
    policy = Policy(model, learning_rate=options.learning_rate)
    settings, log = GrpoSettings(), []
    with LLM(options.engine, max_batch_size=min(64, options.prompts * options.n)) as llm:
        engine = RolloutEngine(llm, max_staleness=1)
        print("step  reward  right  gap      without replay  KL       left out  seconds")
        for step in range(options.steps):
            began = time.monotonic()
            if step % options.every == 0:
                right = score(llm, options)
            draws = [random.Random(f"{step} {number}") for number in range(options.prompts)]
            questions = [draw_question(rng, options) for rng in draws]
            groups = sample(engine, [one.text for one in questions], options, seed=step)
            rewards = torch.tensor([[reward(one, asked) for one in group] for group, asked in zip(groups, questions)])
            advantages = group_advantages(rewards)
            row = {"step": step, "reward": rewards.mean().item(), "right": right}
            row |= gaps(model, [group[0] for group in groups])
            for part, gains in updates(engine, groups, advantages):
                row |= learn(policy, reference, part, gains, settings)
                engine.update_weights(policy.tensors)
            log.append(row | {"seconds": time.monotonic() - began, "weight_version": engine.weight_version})
            show(log[-1])
            if options.log:
                options.log.write_text("".join(json.dumps(one) + "\n" for one in log), encoding="utf-8")
        print(f"right at the end: {score(llm, options):.0%}")
    if options.chart:
        draw_chart(options.chart, log)


def sample(engine: RolloutEngine, questions: list[str], options: argparse.Namespace, seed: int) -> list[list[Rollout]]:
    """Sample a group for each question: what is likely under the model alone, thoughts and all."""
    params = SamplingParams(n=options.n, temperature=1.0, top_p=1.0, max_tokens=options.max_tokens)
    prompts = [ask(engine.llm, question, params) for question in questions]
    return engine.generate(prompts, params, seed=seed)


def ask(llm: LLM, question: str, params: SamplingParams) -> Any:
    """Return the prompt of a question that may be thought about."""
    message = {"role": "user", "content": question}
    return llm.chat_request([message], params, chat_template_kwargs={"thinking": True}).prompt


@dataclass(frozen=True)
class Question:
    """What is asked, how it is thought out, and the answer."""

    text: str
    thought: str
    answer: str


def draw_question(rng: random.Random, options: argparse.Namespace, held_out: bool = False) -> Question:
    """Return a question; those that are held out were never trained on, and are scored with."""
    while True:
        b, a = sorted(rng.randrange(10 ** (options.digits - 1), 10**options.digits) for _ in range(2))
        if options.sign == "+" and rng.random() < 0.5:
            a, b = b, a
        asked = f"{a} {options.sign} {b}"
        if is_held_out(asked) == held_out:
            thought = sum_thought(a, b) if options.sign == "+" else difference_thought(a, b)
            return Question(f"What is {asked}?", thought, str(a + b if options.sign == "+" else a - b))


def reward(rollout: Rollout, question: Question) -> float:
    """Return 0 to 1: half for the share of right lines in the thought, half for the answer and nothing else."""
    thought, _, answer = rollout.text.rpartition("</think>")
    lines = question.thought.splitlines()
    right = sum(one == other for one, other in zip(lines, thought.splitlines())) / len(lines)
    return 0.5 * right + 0.5 * (rollout.finish_reason == "stop" and answer.strip() == question.answer)


def gaps(model: TrainedModel, rollouts: list[Rollout]) -> dict[str, float]:
    """Return how far the trainer is from the engine before it learns: |Δ log p| of the sampled tokens."""
    batch, seen = RolloutBatch.of(rollouts), {}
    for name, replay in (("gap", True), ("gap_without_replay", False)):
        with torch.no_grad():
            values, _ = token_logprobs(model, batch, replay=replay)
        distances = (values - batch.logprobs)[batch.sampled].abs()
        seen |= {name: distances.mean().item(), f"largest_{name}": distances.max().item()}
    return seen


def updates(
    engine: RolloutEngine, groups: list[list[Rollout]], advantages: torch.Tensor
) -> Iterator[tuple[list[Rollout], list[float]]]:
    """Yield the rollouts of each update with their advantages; where a whole group did alike nothing is learned."""
    pairs = [(one, gain) for group, gains in zip(groups, advantages.tolist()) for one, gain in zip(group, gains)]
    gain_of = {id(one): gain for one, gain in pairs if gain}
    taught = [one for one, gain in pairs if gain]
    random.Random(len(taught)).shuffle(taught)
    for start in range(0, len(taught), UPDATE_ROWS):
        part = engine.fresh(taught[start : start + UPDATE_ROWS])
        if part:
            yield part, [gain_of[id(one)] for one in part]


def learn(
    policy: Policy, reference: TrainedModel, rollouts: list[Rollout], gains: list[float], settings: GrpoSettings
) -> dict[str, float]:
    """Update the weights by one part of the rollouts, a few rows at a time; returns what was seen."""
    seen: dict[str, float] = {}
    for start in range(0, len(rollouts), ROWS):
        rows = slice(start, start + ROWS)
        batch, share = RolloutBatch.of(rollouts[rows]), len(rollouts[rows]) / len(rollouts)
        new, _ = token_logprobs(policy.model, batch)
        with torch.no_grad():
            other, _ = token_logprobs(reference, batch)
        loss = grpo_loss(new, batch.logprobs, torch.tensor(gains[rows]), batch.sampled, settings, other)
        (loss.total * share).backward()
        for name in ("kl", "masked", "clipped"):
            seen[name] = seen.get(name, 0.0) + share * getattr(loss, name)
    policy.step()
    return seen


def score(llm: LLM, options: argparse.Namespace) -> float:
    """Return the share of held-out questions that are answered right, greedily."""
    rng, params = random.Random("held out"), SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    items = [draw_question(rng, options, held_out=True) for _ in range(options.items)]
    outputs = llm.generate([ask(llm, question.text, params) for question in items], params)
    answers = [output.outputs[0].text.rpartition("</think>")[2].strip() for output in outputs]
    return sum(answer == question.answer for answer, question in zip(answers, items)) / len(items)


def read_model(checkpoint: Path) -> TrainedModel:
    model = TrainedModel(ModelConfig.load(checkpoint))
    with Checkpoint.open(checkpoint) as source:
        read_weights(model, source)
    return model


def show(row: dict[str, Any]) -> None:
    known = {name: row.get(name, 0.0) for name in ("gap", "gap_without_replay", "kl", "masked")}
    print(
        f"{row['step']:4}  {row['reward']:6.3f}  {row['right']:5.0%}  {known['gap']:.1e}  "
        f"{known['gap_without_replay']:14.1e}  {known['kl']:.1e}  {known['masked']:8.0%}  {row['seconds']:7.1f}",
        flush=True,
    )


def draw_chart(path: Path, log: list[dict[str, Any]]) -> None:
    """Draw the rewards, and how far engine and trainer are apart."""

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        steps = [row["step"] for row in log]
        above.plot(steps, [row["reward"] for row in log], label="reward, sampled", linewidth=2)
        above.plot(steps, [row["right"] for row in log], label="held out, greedy", linewidth=2)
        above.set_ylim(0, 1.02)
        for name, label, color in (("gap", "replayed", "C0"), ("gap_without_replay", "not replayed", "C1")):
            for part, kind, style in (("", "mean", "-"), ("largest_", "largest", ":")):
                gaps = [row.get(part + name) or float("nan") for row in log]
                below.semilogy(steps, gaps, style, label=f"{kind}, {label}", color=color, linewidth=2)
        for axes, label in ((above, "reward, share right"), (below, "|Δ log p|, engine and trainer")):
            axes.set_ylabel(label)
            axes.grid(color="0.9")
            axes.legend(fontsize="small", frameon=False)
        below.set_xlabel("step")

    write_figure(path, (8.6, 6.4), draw, dpi=150)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__ or "")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--digits", type=int, default=2, help="of the numbers")
    parser.add_argument("--sign", choices=["+", "-"], default="-", help="what is done with them")
    parser.add_argument("--prompts", type=int, default=16, help="questions of a step")
    parser.add_argument("--n", type=int, default=16, help="answers to each")
    parser.add_argument("--max-tokens", type=int, default=72)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--items", type=int, default=50, help="held-out questions of a score")
    parser.add_argument("--every", type=int, default=10, help="steps from one score to the next")
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--log", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
