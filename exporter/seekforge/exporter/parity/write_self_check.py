"""Give an engine the self-check that only a machine which runs it can make: results that parity has just accepted.

An engine for a GPU is built where no GPU is, so it leaves the build without stored results. `parity` runs it beside
PyTorch; when it passes, PyTorch's logits on one of the prompts go into the manifest, with a tolerance of twice the
difference that was measured there. From then on the runtime compares them before it serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from seekforge.common.errors import ConfigError
from seekforge.exporter.parity.compare.metrics import log_softmax
from seekforge.exporter.tolerances import GATE
from seekforge.formats.dump import Dump
from seekforge.formats.engine.manifest import SelfCheck, SelfCheckRow, load_manifest, save_manifest
from seekforge.formats.parity_steps import ParitySteps, PlanStep

#: Longest prompt that is taken where there is a shorter one: it is run at every start.
_LONGEST: Final = 256
_ROWS, _TOP = 3, 20
#: The tolerance, in measured differences.
_FACTOR: Final = 2.0


def stored_step(plan: ParitySteps) -> tuple[int, PlanStep]:
    """Return the step whose results are stored, and its number: of the prompts that were run whole and alone.

    Raises:
        ConfigError: there is none.
    """
    whole = {
        number: step
        for number, _, step in plan.steps()
        if step.graph == "model" and len(step.tokens) == 1 and step.starts == (0,) and step.logits_index
    }
    if not whole:
        raise ConfigError("--write-self-check: no prompt was run whole and alone; leave 'whole' in --modes")
    lengths = {number: len(step.tokens[0]) for number, step in whole.items()}
    short = [(length, number) for number, length in lengths.items() if length <= _LONGEST]
    number = max(short)[1] if short else min((length, number) for number, length in lengths.items())[1]
    return number, whole[number]


def make_self_check(judged: Dump, reference: Dump, source: str) -> SelfCheck:
    """Return the results of the reference on one prompt that was prefilled whole.

    Args:
        judged: the engine's dump.
        reference: another side's dump of the same plan.
        source: what computed the reference.

    Raises:
        ConfigError: no prompt of the plan was run whole and alone.
    """
    number, step = stored_step(reference.plan)
    expected, actual = (dump.tensor(number, "logits").astype(np.float64) for dump in (reference, judged))
    picked = sorted({round(i) for i in np.linspace(0, len(step.logits_index) - 1, _ROWS)})
    rows, largest = [], 0.0
    for index in picked:
        ids = np.argsort(-expected[index], kind="stable")[:_TOP]
        sums = [float(values[index].max() - log_softmax(values[index]).max()) for values in (expected, actual)]
        largest = max(largest, float(np.abs(expected[index, ids] - actual[index, ids]).max()), abs(sums[0] - sums[1]))
        rows.append(
            SelfCheckRow(
                position=step.logits_index[index],
                top_ids=tuple(int(i) for i in ids),
                top_logits=tuple(float(value) for value in expected[index, ids]),
                logsumexp=sums[0],
            )
        )
    floor = GATE * float(expected[picked].std())
    return SelfCheck(
        prompt_ids=step.tokens[0],
        rows=tuple(rows),
        tolerance=max(_FACTOR * largest, floor),
        reason=f"twice the largest difference ({largest:.3g} logits) that parity measured and accepted on these rows",
        source=source,
    )


def write_self_check(engine: Path, judged: Dump, reference: Dump, source: str) -> SelfCheck:
    """Put `make_self_check` into the manifest of an engine folder.

    Raises:
        ConfigError: see `make_self_check`.
    """
    check = make_self_check(judged, reference, source)
    save_manifest(engine, load_manifest(engine).model_copy(update={"self_check": check}))
    return check
