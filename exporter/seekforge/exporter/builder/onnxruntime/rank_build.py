"""Engines of several ranks for a CPU: one folder, whose pieces all ranks of a stage run, and weights of each rank.

Constants that all tensor-parallel ranks read alike lie in `weights.bin`. Those that ranks divide lie in a file of each
rank, at the same places for all ranks of a stage; the pieces name the first rank's, and the others put theirs in its
place (`formats.engine.ranks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from seekforge.exporter.builder.onnxruntime.fold import WeightFile
from seekforge.exporter.builder.onnxruntime.graphs import fold_graph, write_graph
from seekforge.exporter.builder.onnxruntime.rank_pieces import cut_at_sums, stage_graphs
from seekforge.exporter.builder.request import read_graph
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Limits
from seekforge.formats.engine.ranks import Ranks
from seekforge.formats.engine.weight_file import WEIGHTS, is_divided
from seekforge.formats.int_quant import Quantization
from seekforge.formats.program import GraphIO, Program
from seekforge.formats.weight_recipes import QuantizedOnce, Recipe, for_rank


@dataclass
class RankGraphs:
    """The folded pieces of a program that ranks share, and where their weights lie.

    Attributes:
        ranks: the layout.
        pieces: piece -> its graph.
        bindings: piece -> constant -> recipe.
    """

    ranks: Ranks
    pieces: dict[str, onnx.ModelProto]
    bindings: dict[str, dict[str, Recipe]]
    _common: WeightFile
    _own: list[WeightFile] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return self._common.num_bytes + sum(file.num_bytes for file in self._own) * self.ranks.parallelism.tp

    @property
    def files(self) -> list[str]:
        """The names of the weight files."""
        parallelism = self.ranks.parallelism
        ranks = [rank for rank in range(parallelism.num_ranks) if self._own[rank // parallelism.tp].num_bytes]
        return [WEIGHTS, *(self.ranks.weight_file(rank) for rank in ranks)]

    def num_nodes(self) -> dict[str, int]:
        """Return graph -> nodes of all its pieces."""
        return {
            graph: sum(len(self.pieces[stem].graph.node) for stems in stages for stem in stems)
            for graph, stages in self.ranks.pieces.items()
        }

    def write_weights(self, folder: Path, source: QuantizedOnce, progress: Callable[[int, int], None]) -> None:
        """Write the weights of every rank.

        Args:
            folder: the engine folder.
            source: the checkpoint; it may keep codes that all ranks read, since the check of the engine reads them too.
            progress: told (bytes that were written, bytes that will be).
        """
        parallelism, total = self.ranks.parallelism, self.num_bytes
        self._common.write(folder, source, lambda done, _: progress(done, total))
        before = self._common.num_bytes
        for rank in range(parallelism.num_ranks):
            weights, tp_rank = self._own[rank // parallelism.tp], rank % parallelism.tp
            if weights.num_bytes:
                weights.write(
                    folder,
                    source.source,
                    lambda done, _, start=before: progress(start + done, total),
                    name=self.ranks.weight_file(rank),
                    part=lambda recipe, at=tp_rank: for_rank(recipe, parallelism, at),
                )
            before += weights.num_bytes

    def write_graphs(self, folder: Path, program: Program) -> dict[str, tuple[GraphIO, ...]]:
        """Write the pieces beside their weights; returns graph -> its pieces in order."""
        return {
            graph: tuple(
                write_graph(self.pieces[stem], folder, program.graphs[graph], f"{stem}.onnx")
                for stems in stages
                for stem in stems
            )
            for graph, stages in self.ranks.pieces.items()
        }


def fold_ranks(
    program_folder: Path,
    program: Program,
    bindings: Mapping[str, Mapping[str, Recipe]],
    config: ModelConfig,
    *,
    coded: Quantization | None,
    limits: Limits,
    taps: bool,
) -> RankGraphs:
    """Cut the graphs of a program into the pieces that ranks run, and fold each.

    Args:
        program_folder: the program.
        program, bindings: what its JSON files say.
        config: its config, parsed.
        coded: which weights become codes.
        limits: the limits of the engine.
        taps: give the tensors inside each layer too.
    """
    parallelism = program.parallelism
    common = WeightFile(WEIGHTS)
    pieces: dict[str, onnx.ModelProto] = {}
    constants: dict[str, dict[str, Recipe]] = {}
    names: dict[str, tuple[tuple[str, ...], ...]] = {}
    layout = Ranks(parallelism=parallelism, pipeline_stages=program.pipeline_stages, pieces={})
    stage_files = [WeightFile(layout.weight_file(stage * parallelism.tp)) for stage in range(parallelism.pp)]
    for graph, described in program.graphs.items():
        stages: list[tuple[str, ...]] = []
        number = 0
        for stage, part in enumerate(stage_graphs(program, graph, read_graph(program_folder, described))):
            stems: list[str] = []
            if part is not None:
                model, read = fold_graph(
                    part, bindings[graph], config, coded=coded, limits=limits, taps=taps, is_typed=True
                )
                for piece in cut_at_sums(model):
                    stem = f"{graph}.{number}"
                    inputs = {value.name for value in piece.graph.input}
                    constants[stem] = {name: recipe for name, recipe in read.items() if name in inputs}
                    for file, divided in ((common, False), (stage_files[stage], True)):
                        file.attach(piece, {n: r for n, r in constants[stem].items() if is_divided(r) == divided})
                    pieces[stem] = piece
                    stems.append(stem)
                    number += 1
            stages.append(tuple(stems))
        names[graph] = tuple(stages)
    return RankGraphs(layout.model_copy(update={"pieces": names}), pieces, constants, common, stage_files)
