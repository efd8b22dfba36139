"""The unspoilt files that cases are made from: as the commands write them for the tiny model, less what repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tests.fuzz.formats import Format, formats
from tests.support.kernel_cases import fake_kernels
from tests.support.samples import audit_of

from seekforge.common.configs import configs_folder
from seekforge.exporter.checkpoint.presets import known_presets
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import DumpWriter, Side
from seekforge.formats.parity_steps import make_plan
from seekforge.formats.targets import load_target
from seekforge.plugins.kernels.kernel_set import to_json
from seekforge.plugins.kernels.launch_plan import statics_of
from seekforge.plugins.kernels.sizes import operators


def tiny_formats(checkpoint: Path, program: Path, engine: Path, scratch: Path) -> dict[str, Format]:
    """Return every format, from a tiny checkpoint, its program and its engine."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    manifest, own_program = read(engine / "manifest.json"), read(program / "program.json")
    config = read(checkpoint / "config.json")
    _fewer_layers(manifest)
    bindings = read(program / "bindings.json")
    for graph, graph_io in own_program["graphs"].items():  # of the weights some will do
        graph_io["inputs"] = [spec for spec in graph_io["inputs"] if spec["role"] not in ("weight", "table")] + [
            spec for spec in graph_io["inputs"] if spec["role"] in ("weight", "table")
        ][:8]
        names = {spec["name"] for spec in graph_io["inputs"]}
        bindings["graphs"][graph] = {name: one for name, one in bindings["graphs"][graph].items() if name in names}
    tokenizer = read(checkpoint / "tokenizer.json")
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:300])
    tokenizer["model"]["merges"] = []
    sizes = operators(ModelConfig.load(checkpoint), kv_format="bf16", numerics=manifest["numerics"])
    op = "DsaIndexer" if "DsaIndexer" in sizes else next(iter(sizes))
    kernels = json.loads(to_json(fake_kernels(op, statics_of(op, sizes[op]), 89)))
    kernels["images"] = dict(list(kernels["images"].items())[:2])
    target = load_target("cpu").model_dump(mode="json")
    return formats(
        manifest=manifest,
        gpu_manifest=_gpu(manifest),
        program=own_program,
        bindings=read(program / "bindings.json"),
        program_bindings=bindings,
        dump=_dump(scratch, config, manifest["numerics"]),
        dump_files={path.name: path.read_bytes() for path in scratch.glob("*.safetensors")},
        config=config,
        generation=read(checkpoint / "generation_config.json"),
        tokenizer=tokenizer,
        target=target | {"gpu": None},
        preset=yaml.safe_load((configs_folder() / "models" / f"{known_presets()[0]}.yaml").read_text(encoding="utf-8")),
        index={"metadata": {"total_size": 40}, "weight_map": dict.fromkeys("abc", "model.safetensors")},
        kernels=kernels,
        kernel_index={
            "format": 1,
            "kernels": [{"op": "DsaIndexer", "sm": 89, "digest": "0" * 64, "file": "sm89/a.json"}] * 2,
        },
    )


def _fewer_layers(manifest: dict[str, Any]) -> None:
    """Keep one layer of the main model, so that a manifest is small and its values still agree."""
    model = manifest["graphs"]["model"]

    def kept(name: str) -> bool:
        layer = name.rpartition(".")[2]
        return not layer.isdigit() or layer == "0"

    for side in ("inputs", "outputs"):
        model[side] = [spec for spec in model[side] if kept(spec["name"])]
    model["aliases"] = {out: source for out, source in model["aliases"].items() if kept(out)}
    names = {spec["name"] for spec in model["inputs"]}
    if "index_cache.0" not in names:
        width = manifest["cache"]["index_dim"]
        model["inputs"].append({"name": "index_cache.0", "dtype": "f32", "shape": ["NS", width], "role": "cache"})
    manifest["layer_range"] = [0, 1]
    manifest["cache"]["layers"] = [0]
    manifest["cache"]["bytes_per_block"] //= 5
    manifest["cache"]["bytes_per_block"] *= 2
    manifest["files"] = manifest["files"][:2] + manifest["files"][-3:]
    for file in manifest["files"]:  # as of a small one
        file |= {"bytes": min(file["bytes"], 1000), "chunks": file["chunks"][:1]}
    manifest["self_check"]["prompt_ids"] = manifest["self_check"]["prompt_ids"][:4]
    manifest["self_check"]["rows"] = [row | {"position": 1} for row in manifest["self_check"]["rows"][:1]]


def _gpu(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with what GPU engines have beside the rest."""
    keys = ("weights", "scratch", "activations", "reserve", "total", "usable")
    shapes = {"input_ids": [[1, 1], [1, 1], [8, 1]], "latent_cache.0": [[64, 192], [640, 192], [1 << 20, 192]]}
    return dict(manifest) | {
        "target": {"name": "l40s", "backend": "tensorrt-rtx", "sm": 89, "sms": [89, 90]},
        "runtime_versions": {"tensorrt-rtx": "1.7.1.116"},
        "weights": {"path": "/checkpoint", "index_digest": "0" * 64},
        "plugins": {"DsaIndexer": {"version": 1, "products": "fp8", "kernel_digest": "0" * 64, "num_layers": 4}},
        "profiles": {"decode": {"model": shapes}, "prefill": {"model": shapes}},
        "audit": json.loads(audit_of(dict.fromkeys(keys, 1 << 30)).model_dump_json()),
    }


def _dump(scratch: Path, config: dict[str, Any], numerics: dict[str, Any]) -> dict[str, Any]:
    plan = make_plan(contexts=(5,), vocab_size=1024, index_topk=64, has_mtp=True, modes=("decode", "ragged"))
    side = Side(
        kind="engine", name="e", numerics=numerics, activations="f32", layers=(0, 1), config=config, versions={}
    )
    writer = DumpWriter(scratch, side, plan)
    for number, _, _ in plan.steps():
        writer.write(number, {"hidden": np.zeros((2, 3), np.float32), "expert_ids.0": np.zeros((2, 4), np.int32)})
    writer.close()
    return json.loads((scratch / "dump.json").read_text(encoding="utf-8"))
