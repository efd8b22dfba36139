"""The ranks of a new engine in one process, step by step together: what a self-check at build runs.

The runtime has a process for each; both run the same pieces on the same weights and add up in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from seekforge.common.dtypes import ONNX
from seekforge.common.errors import EngineError
from seekforge.exporter.builder.onnxruntime.session import OrtOutputs, OrtSession
from seekforge.formats.engine.ranks import PARTIAL, Ranks, is_handed_on, received_name, sum_name
from seekforge.formats.program import GraphIO
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.formats.weight_recipes import Recipe


class RankSession:
    """All ranks of an engine, as one `StepRunner`.

    Args:
        folder: engine folder.
        ranks: the layout.
        pieces: piece -> its inputs and outputs.
        bindings: piece -> constant -> recipe.

    Raises:
        EngineError: ONNX Runtime cannot load a piece.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, pieces: Mapping[str, GraphIO], bindings: Mapping[str, Mapping[str, Recipe]]
    ) -> None:
        self._ranks, self._pieces, self._tp = ranks, pieces, ranks.parallelism.tp
        self._sessions: list[OrtSession] = []
        for rank in range(ranks.parallelism.num_ranks):
            graphs = {stem: pieces[stem] for stem in ranks.stems(rank // self._tp)}
            weights = {
                stem: {
                    name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, ONNX[bindings[stem][name].dtype])
                    for name, value in constants.items()
                }
                for stem, constants in ranks.own_constants(folder, bindings, rank).items()
            }
            self._sessions.append(OrtSession(folder, graphs, weights=weights))

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are per_rank back."""
        for session in self._sessions:
            session.allocate_caches(num_blocks)

    def run(self, inputs: StepInputs, *, outputs: Collection[str] | None = None, graph: str = MODEL) -> OrtOutputs:
        """Run one step; caches are updated in place.

        Raises:
            EngineError: the ranks of a stage do not end with the same.
        """
        results = OrtOutputs()
        handed: list[dict[str, np.ndarray]] = [{} for _ in range(self._tp)]
        for stage, stems in enumerate(self._ranks.pieces[graph]):
            values = [dict(inputs.intermediate_tensors) | one for one in handed]
            for stem in stems:
                per_rank = [
                    self._sessions[stage * self._tp + rank].run(replace(inputs, intermediate_tensors=one), graph=stem)
                    for rank, one in enumerate(values)
                ]
                for spec in self._pieces[stem].outputs:
                    if spec.name not in per_rank[0]:  # a cache
                        continue
                    parts = [one[spec.name] for one in per_rank]
                    if spec.name.startswith(PARTIAL):
                        total = functools.reduce(np.add, parts)
                        for one in values:
                            one[sum_name(spec.name)] = total
                    elif spec.role == "intermediate":
                        for one, part in zip(values, parts, strict=True):
                            one[spec.name] = part
                    elif outputs is None or spec.name in outputs:
                        if spec.role == "result" and not all(np.array_equal(parts[0], part) for part in parts[1:]):
                            raise EngineError(f"ranks of stage {stage} give different {spec.name}; please report this")
                        results[spec.name] = parts[0]
            handed = [
                before | {received_name(name): value for name, value in one.items() if is_handed_on(name)}
                for before, one in zip(handed, values, strict=True)
            ]
        return results
