"""What each rank of a program reads of a checkpoint. Light: neither torch nor onnx.

A pipeline stage is what `stages.cut` makes of `model.onnx` at `Program.pipeline_stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from seekforge.exporter.models import family_of
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import Program, layer_of
from seekforge.formats.weight_recipes import Recipe, for_rank


def rank_bindings(
    program: Program, bindings: Mapping[str, Mapping[str, Recipe]], rank: int
) -> dict[str, dict[str, Recipe]]:
    """Return graph -> input -> recipe of what one rank reads: the part that its stage has, and of that its part.

    Tables belong to every stage. The MTP module is on the last one.

    Raises:
        ConfigError, ProgramError: there is no such rank, or a recipe is divided among another number of them.
    """
    parallelism = program.parallelism
    place = parallelism.coordinates(rank)
    reads = stage_reads(program, place.pp_rank)
    return {
        graph: {
            name: for_rank(recipe, parallelism, place.tp_rank) for name, recipe in named.items() if reads(graph, name)
        }
        for graph, named in bindings.items()
    }


def stage_reads(program: Program, stage: int) -> Callable[[str, str], bool]:
    """Return whether the ranks of a pipeline stage have an input, by the names of its graph and of itself."""
    start, stop = program.pipeline_stages[stage]
    is_first, is_last = stage == 0, stage == program.parallelism.pp - 1
    config = ModelConfig.parse(program.config, "program.json")
    family = family_of(config)
    before = family.names_before(config)
    behind = {row.name for row in family.end_parameters() if row.is_behind}

    def reads(graph: str, name: str) -> bool:
        if graph != "model":
            return is_last
        layer = layer_of(name)
        if layer is not None:
            return start <= layer < stop
        return is_first if name in before else is_last if name in behind else True

    return reads
