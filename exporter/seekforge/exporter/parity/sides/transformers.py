"""`transformers`' model of the family in FP32 as the other side: an implementation that shares no line with it.

It has neither FP8 nor Hadamard nor an MTP module, and it is run on whole prompts, so only `whole` cases can be
compared, with an engine of `exact` numerics. The whole model is in memory, in FP32: it is for small models.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seekforge.common.errors import ConfigError, EnvironmentFault, OutputError
from seekforge.common.paths import real_path
from seekforge.common.requirements import install_module
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.schema import expected_tensors, needless_tensors
from seekforge.exporter.models import load_family
from seekforge.formats.dump import Dump, DumpWriter, Side
from seekforge.formats.numerics import EXACT
from seekforge.formats.parity_steps import ParitySteps
from seekforge.formats.weight_recipes import TensorSource, evaluate
from seekforge.formats.weight_recipes.stored import values_recipe


def check_installed() -> None:
    """Refuse a comparison for which the library is missing, before anything is run.

    Raises:
        EnvironmentFault: with the command that installs it.
    """
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"--against transformers needs {error.name}, which is not installed; {install_module('transformers')}, "
            "or leave --against out to compare with PyTorch"
        ) from None


def write_oracle_dump(checkpoint_folder: Path, source: TensorSource, plan: ParitySteps, out: Path, work: Path) -> Dump:
    """Run `transformers` on the whole prompts of a plan.

    Args:
        checkpoint_folder: the checkpoint.
        source: its tensors.
        plan: steps of `whole` cases only.
        out: an empty folder for the dump.
        work: an empty folder for a dequantized copy, which is removed by its owner.

    Raises:
        ConfigError: the plan has other cases.
    """
    if any(case.mode != "whole" for case in plan.cases):
        raise ConfigError("--against transformers runs whole prompts only; pass --modes whole")
    model, config = _load(checkpoint_folder, source, work)
    family = load_family(config["model_type"])
    number = int(config["num_hidden_layers"])
    side = Side(
        kind="transformers",
        name=real_path(checkpoint_folder).name,
        numerics=EXACT.model_dump(),
        activations="f32",
        layers=(0, number),
        config=config,
        versions={name: importlib.metadata.version(name) for name in ("transformers", "torch")},
    )
    writer = DumpWriter(out, side, plan)
    for step_number, _, step in plan.steps():
        with family.module("oracle").watch(model) as seen, torch.inference_mode():
            output = model(torch.tensor(step.tokens), output_hidden_states=True)
        logits = output.logits.flatten(0, 1)[list(step.logits_index)].float().numpy()
        tensors: dict[str, np.ndarray] = {"logits": logits}
        for layer, (mid, out_) in seen["stream"].items():
            # the pair that our layers hand over: what the MLP gave, and the stream it is added to
            tensors[f"hidden_states.{layer + 1}"] = (out_ - mid).numpy()
            tensors[f"residual.{layer + 1}"] = mid.numpy()
        tensors |= family.module("oracle").selections(seen, config)
        writer.write(step_number, tensors)
    writer.close()
    return Dump.open(out)


def _load(checkpoint_folder: Path, source: TensorSource, work: Path) -> tuple[Any, dict[str, Any]]:
    """Write an FP32 copy and load it; nothing but the MTP layer may be left out."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers.utils import logging

    from seekforge.exporter.models.shared.weights import to_torch

    tensors: dict[str, torch.Tensor] = {}
    with open_checkpoint(checkpoint_folder) as opened:
        needless = needless_tensors(opened.checkpoint.names)
        # in the plain form every number that may have a fraction is a float, as transformers insists
        config, fields = opened.config.model_dump(mode="json"), opened.config.model_fields
        for name, tensor in expected_tensors(opened.config).items():
            if tensor.part_of is not None or name in needless or name not in opened.checkpoint:
                continue
            if tensor.form is None or tensor.matrix is None:
                tensors[name] = to_torch(source.tensor(name)).float().contiguous()
                continue
            module = name.removesuffix("_packed")
            value = evaluate(values_recipe(tensor.form, module, tensor.matrix, "f32"), source)
            tensors[module] = to_torch(value).contiguous()
        try:
            save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(
                f"{work}: cannot be written ({error}); set TMPDIR to a folder with room for the weights in f32"
            ) from None
    known = {key: config[key] for key in fields if key != "quantization_config"}
    (work / "config.json").write_text(json.dumps(known | {"torch_dtype": "float32"}), encoding="utf-8")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    loaded: Any = (
        load_family(config["model_type"])
        .module("oracle")
        .model_class()
        .from_pretrained(work, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    )
    model, info = loaded
    prefix = f"model.layers.{config['num_hidden_layers']}."
    foreign = [*info["missing_keys"], *(key for key in info["unexpected_keys"] if not key.startswith(prefix))]
    if foreign:
        raise ConfigError(f"{checkpoint_folder}: transformers does not know or does not find {sorted(foreign)[0]}")
    return model.eval(), config
