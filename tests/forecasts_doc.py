"""Write the table of docs/targets.md that has forecasts of `plan` beside decode steps that others published.

python -m tests.forecasts_doc        after a change of a kernel's launches, of the cost model or of the forecast

Published are milliseconds between two tokens of a sequence, of engines that others measured on eight GPUs. Rates that
were published in their place are tokens per second of each sequence.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from seekforge.exporter.planner.api import read_config
from seekforge.exporter.planner.forecast import forecast
from seekforge.exporter.planner.question import Question
from seekforge.exporter.sizing.memory import Workload
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import load_target

PAGE = Path(__file__).resolve().parents[1] / "docs" / "targets.md"
_BEGIN, _END = "<!-- begin forecasts -->", "<!-- end forecasts -->"
#: All figures are of one server.
_LAYOUT = Parallelism(tp=8)


@dataclass(frozen=True)
class Published:
    """A series of figures.

    Attributes:
        who: the model, machine, engine and where it was published.
        config, target: what is forecast: a name of configs/models, and the GPUs.
        context: tokens that a sequence has seen, in the middle of its answer where the length of that was published.
        step_ms: sequences at once -> milliseconds of a decode step.
    """

    who: str
    config: str
    target: str
    context: int
    step_ms: dict[int, float]


PUBLISHED = [
    Published(
        "DeepSeek-V3.2, 8 B200, SGLang's nightly run of 2026-01-08, DP attention, 4,096 tokens in "
        "(sgl-project/sglang issue 15025)",
        "full", "b200", 4096, {1: 19.2, 8: 19.9, 16: 25.3, 64: 26.7},
    ),
    Published(
        "DeepSeek-R1, 8 H200, SGLang 0.5.7, FP8, TP8, 1,024 tokens in, 1,024 out, mean time per token "
        "(SemiAnalysisAI/InferenceX issue 870, 2026-03-05)",
        "v3-full", "h200", 1536, {8: 12.8, 16: 17.2, 32: 25.6, 64: 34.6},
    ),
    Published(
        "DeepSeek-V3, 8 H200, SGLang 0.4.1.post2, 128 tokens in, 256 out (sgl-project/sglang pull request 2643)",
        "v3-full", "h200", 256, {1: 33.0, 8: 38.8, 32: 42.1},
    ),
]  # fmt: skip


def forecast_ms(series: Published, batch: int) -> float:
    """Return the forecast of a step of as many sequences on eight GPUs of the kind, tp 8."""
    config, target = read_config(series.config), load_target(series.target)
    work = Workload(series.context, batch, target.limits.max_num_batched_tokens)
    question = Question("fp8", "fp8_ds" if series.config == "full" else "bf16", target=target)
    return forecast(config, target, _LAYOUT, work, question).step_ms


def table() -> list[list[str]]:
    """Return the cells of the table's rows: what was published, batch, theirs, forecast, ratio."""
    rows: list[list[str]] = []
    for series in PUBLISHED:
        for number, (batch, theirs) in enumerate(series.step_ms.items()):
            ours = round(forecast_ms(series, batch), 1)
            rows.append(
                [
                    series.who if number == 0 else "",
                    str(batch),
                    f"{theirs:.1f}",
                    f"{ours:.1f}",
                    f"{theirs / ours:.1f}",
                ]
            )
    return rows


def written(text: str) -> list[list[str]]:
    """Return the cells that a page has."""
    _, _, rest = text.partition(_BEGIN)
    lines = rest.partition(_END)[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def updated(text: str) -> str:
    """Return a page with its table replaced."""
    head, _, rest = text.partition(_BEGIN)
    _, found, tail = rest.partition(_END)
    if not found:
        raise SystemExit(f"docs/targets.md has no {_BEGIN} ... {_END}")
    rows = ["| published | batch | theirs | forecast, TP8 | ratio |", "|---|---|---|---|---|"]
    rows += [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in table()]
    return "\n".join([f"{head}{_BEGIN}", *rows, f"{_END}{tail}"])


def main() -> int:
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
