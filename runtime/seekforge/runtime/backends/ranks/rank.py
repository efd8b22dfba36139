"""One rank of a CPU engine: its pieces of the graphs, its weights, its caches, and a step of it.

A graph is cut where ranks add up (`SumRanks`), and what pieces hand on says by its name where it goes
(`formats.engine.ranks`). The pieces are the same files for all ranks of a stage. Weights that ranks divide are in a
file of the rank's own, and take the place of those that the pieces name, which are the first rank's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from seekforge.common.dtypes import NUMPY, ONNX
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.engine.ranks import PARTIAL, Ranks, is_handed_on, received_name, shown_name, sum_name
from seekforge.formats.program import GraphIO, load_bindings, role_of
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.formats.weight_recipes import QuantizedOnce, Recipe, TensorSource, evaluate_into, for_rank, tensors_of
from seekforge.runtime.backends.base import GraphMetrics
from seekforge.runtime.backends.onnxruntime import OrtGraph
from seekforge.runtime.backends.ort_device import OrtDevice
from seekforge.runtime.backends.ranks.collectives import Collectives
from seekforge.runtime.backends.ranks.micro_batches import join_parts, split_step
from seekforge.runtime.backends.ranks.same_check import SameCheck
from seekforge.runtime.backends.ranks.stage_links import StageLinks
from seekforge.runtime.backends.weights import GivenTensors, changed_constants


class Rank:
    """An opened rank, which runs its part of each step.

    Attributes:
        number: the rank.
        collectives: what it has of the others.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        number: int,
        collectives: Collectives,
        threads: int,
        *,
        checked: bool = False,
    ) -> None:
        assert manifest.ranks is not None
        self.number, self.collectives = number, collectives
        self._folder, self._manifest, self._ranks, self._threads = folder, manifest, manifest.ranks, threads
        self._place = self._ranks.parallelism.coordinates(number)
        first = number - self._place.tp_rank
        self._stage = range(first, first + self._ranks.parallelism.tp)
        self._num_blocks: int | None = None
        self._links = StageLinks(manifest, number, collectives)
        self._check = SameCheck(collectives, self._ranks.parallelism, number) if checked else None
        self._bindings = load_bindings(folder)
        self._weights = _own_weights(folder, self._ranks, self._bindings, number)
        self._pieces = {
            graph: [
                OrtGraph(folder, graph, piece, threads, self._weights.get(Path(piece.file).stem, {}), OrtDevice())
                for piece in ios
            ]
            for graph, ios in self._links.pieces(manifest).items()
        }
        self._read_last = {
            graph: _read_last(ios, self._links.handed_on) for graph, ios in self._links.pieces(manifest).items()
        }

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are given back."""
        self._num_blocks = num_blocks
        for pieces in self._pieces.values():
            for piece in pieces:
                piece.allocate_caches(num_blocks, self._manifest.cache.block_size)

    def run(
        self, inputs: StepInputs, outputs: Collection[str], graph: str = MODEL, parts: int = 1
    ) -> dict[str, np.ndarray]:
        """Run this rank's part of a step.

        Args:
            inputs: the step.
            outputs: names of the outputs that are wanted; `shown_name` has those of single ranks.
            graph: which graph.
            parts: micro-batches in which the step goes through the stages, see `micro_batches`.

        Returns:
            On rank 0 the outputs that were asked for; on others, those of their stage.
        """
        results: dict[str, np.ndarray] = {}
        if graph in self._pieces:
            cut = split_step(inputs, parts)
            results = join_parts([self._run_part(part.inputs, outputs, graph) for part in cut], cut)
        return self._links.collect(graph, results)

    def _run_part(self, inputs: StepInputs, outputs: Collection[str], graph: str) -> dict[str, np.ndarray]:
        """Run one micro-batch through the pieces of this stage."""
        results: dict[str, np.ndarray] = {}
        values: dict[str, np.ndarray] = dict(inputs.intermediate_tensors)
        if graph == MODEL:
            values |= self._links.receive()
        for number, piece in enumerate(self._pieces[graph]):
            self._run_piece(piece, inputs, outputs, values, results)
            for name in self._read_last[graph][number]:
                values.pop(name, None)
        if graph == MODEL:
            made = {received_name(name): value for name, value in values.items() if is_handed_on(name)}
            self._links.hand_on(values | made)
        return results

    def cache(self, name: str) -> np.ndarray | None:
        """Return a copy of one layer's cache, such as `latent_cache.3`; None where its stage is another."""
        for pieces in self._pieces.values():
            for piece in pieces:
                if name in piece.caches:
                    return piece.caches[name].numpy().copy()
        return None

    def check_update(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Refuse new weights that do not belong to the model, or not together.

        Raises:
            EngineError: see `LLM.update_weights`.
        """
        changed_constants(self._bindings, tensors)

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Evaluate this rank's part of what reads `tensors`, which `check_update` passed, and open its pieces anew."""
        reopened: dict[tuple[str, int], OrtGraph] = {}
        source = QuantizedOnce(GivenTensors(tensors))
        weights = {stem: dict(values) for stem, values in self._weights.items()}
        for graph, ios in self._links.pieces(self._manifest).items():
            for number, piece in enumerate(ios):
                stem = Path(piece.file).stem
                recipes = {
                    name: for_rank(recipe, self._ranks.parallelism, self._place.tp_rank)
                    for name, recipe in self._bindings[stem].items()
                }
                recipes = {name: recipe for name, recipe in recipes.items() if tensors_of(recipe) & tensors.keys()}
                for name, recipe in recipes.items():
                    weights.setdefault(stem, {})[name] = _evaluated(recipe, source)
                if recipes:
                    reopened[graph, number] = OrtGraph(
                        self._folder, graph, piece, self._threads, weights[stem], OrtDevice()
                    )
        self._weights = weights
        for (graph, number), piece in reopened.items():
            piece.caches = self._pieces[graph][number].caches
            self._pieces[graph][number] = piece

    def graph_metrics(self) -> GraphMetrics:
        """Return zeros: there are no CUDA graphs."""
        return GraphMetrics()

    def abort(self) -> None:
        """Do nothing: whoever waits here looks whether all ranks live."""

    def close(self) -> None:
        """Give back sessions and caches."""
        self._pieces.clear()

    def _run_piece(
        self,
        piece: OrtGraph,
        inputs: StepInputs,
        outputs: Collection[str],
        values: dict[str, np.ndarray],
        results: dict[str, np.ndarray],
    ) -> None:
        """Run one piece, and put what it gives where it belongs."""
        shown = [
            (name, rank) for name in piece.output_names for rank in self._stage if shown_name(rank, name) in outputs
        ]
        wanted = [name for name in piece.output_names if name in outputs]
        inner = piece.intermediate_outputs
        choices = [name for name in piece.output_names if role_of(name) == "tap"] if self._check is not None else []
        fetched = piece.run(
            replace(inputs, intermediate_tensors=values), {*wanted, *inner, *choices, *(name for name, _ in shown)}
        )
        results.update((name, fetched.fetch(name)) for name in wanted)
        for name, rank in shown:  # all ranks of the stage come here, and the first gets what the one has
            value = fetched.fetch(name)
            results[shown_name(rank, name)] = self.collectives.sum(
                value if rank == self.number else np.zeros_like(value)
            )
        if self._check is not None:
            for name in choices:
                self._check.require(name, fetched.fetch(name))
        for name in inner:
            if name.startswith(PARTIAL):
                values[sum_name(name)] = self.collectives.sum(fetched.fetch(name))
                if self._check is not None:
                    self._check.require(f"{sum_name(name)} of graph {piece.name}", values[sum_name(name)])
            else:
                values[name] = fetched.fetch(name)


def _read_last(pieces: Sequence[GraphIO], kept: Collection[str]) -> list[list[str]]:
    """Return for each piece what it takes from others and no later one does, nor the next stage."""
    last = {spec.name: number for number, piece in enumerate(pieces) for spec in piece.with_role("intermediate")}
    return [
        [name for name, at in last.items() if at == number and not is_handed_on(name) and name not in kept]
        for number in range(len(pieces))
    ]


def _evaluated(recipe: Recipe, source: TensorSource) -> ort.OrtValue:
    value = np.empty(recipe.shape, NUMPY[recipe.dtype])
    evaluate_into(recipe, source, value)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, ONNX[recipe.dtype])


def _own_weights(
    folder: Path, ranks: Ranks, bindings: Mapping[str, Mapping[str, Recipe]], rank: int
) -> dict[str, dict[str, ort.OrtValue]]:
    """Return piece -> constant -> value of what ranks divide. The first rank of a stage needs none: pieces name its
    file."""
    if ranks.parallelism.coordinates(rank).tp_rank == 0:
        return {}
    return {
        stem: {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, ONNX[bindings[stem][name].dtype])
            for name, value in constants.items()
        }
        for stem, constants in ranks.own_constants(folder, bindings, rank).items()
    }
