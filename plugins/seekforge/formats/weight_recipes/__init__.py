"""How each weight input of a program comes from checkpoint tensors: recipes, their evaluation, coverage.

A recipe is a small tree. Leaves name a checkpoint tensor (`take`) or a table computed from the config
(`computed`); inner nodes slice, reshape, concatenate, stack, dequantize, cast, or split among ranks. It is plain
data (bindings.json), so that any runtime can fill the inputs straight from the shards. One file serves all ranks:
`for_rank` turns each split into the slice of one rank.
"""

from seekforge.formats.weight_recipes.constructors import (
    as_bytes,
    block_codes,
    cast,
    concat,
    dequantize,
    expert_map,
    for_rank,
    hadamard_table,
    nvfp4_rows,
    nvfp4_scales,
    ones_table,
    reshape,
    retarget,
    rope_table,
    slice_,
    split,
    stack,
    take,
    transpose,
    vocab_start,
    wide_values,
)
from seekforge.formats.weight_recipes.coverage import Coverage, coverage, tensors_of
from seekforge.formats.weight_recipes.evaluation import (
    FP8_VALUES,
    QuantizedOnce,
    TensorSource,
    dequantize_into,
    evaluate,
    evaluate_into,
    rounds_once,
)
from seekforge.formats.weight_recipes.read import read_recipe
from seekforge.formats.weight_recipes.recipe import Recipe
from seekforge.formats.weight_recipes.tables import hadamard, rope_rows, yarn_inv_freq

__all__ = [
    "FP8_VALUES",
    "Coverage",
    "QuantizedOnce",
    "Recipe",
    "TensorSource",
    "as_bytes",
    "block_codes",
    "cast",
    "concat",
    "coverage",
    "dequantize",
    "dequantize_into",
    "evaluate",
    "evaluate_into",
    "expert_map",
    "for_rank",
    "hadamard",
    "hadamard_table",
    "nvfp4_rows",
    "nvfp4_scales",
    "ones_table",
    "read_recipe",
    "reshape",
    "retarget",
    "rope_rows",
    "rope_table",
    "rounds_once",
    "slice_",
    "split",
    "stack",
    "take",
    "tensors_of",
    "transpose",
    "vocab_start",
    "wide_values",
    "yarn_inv_freq",
]
