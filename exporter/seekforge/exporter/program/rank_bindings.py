"""What each rank of a program reads of a checkpoint. Light: neither torch nor onnx.

A pipeline stage is what `stages.cut` makes of `model.onnx` at `Program.pipeline_stages`.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    start, stop = program.pipeline_stages[place.pp_rank]
    is_first, is_last = place.pp_rank == 0, place.pp_rank == parallelism.pp - 1
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

    return {
        graph: {
            name: for_rank(recipe, parallelism, place.tp_rank) for name, recipe in named.items() if reads(graph, name)
        }
        for graph, named in bindings.items()
    }
