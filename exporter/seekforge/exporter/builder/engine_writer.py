"""The engine's folder: what every backend's engine carries along of its program, and the manifest that seals it.

A backend compiles into the folder and says what it made (`EngineParts`). What an engine takes from its program is the
same for all: tokenizer files, sampling defaults, sizes of the caches, `bindings.json`, `target.yaml`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from seekforge.common.errors import ProgramError
from seekforge.common.files import sha256_file
from seekforge.common.reading import LISTING_BYTES, read_bytes
from seekforge.exporter.builder.generation import read_generation
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.end_of_sequence import as_written
from seekforge.formats.engine.agreement import cache_block_bytes
from seekforge.formats.engine.manifest import (
    ENGINE_FORMAT,
    TARGET,
    Audit,
    Cache,
    Limits,
    Manifest,
    PluginUse,
    SelfCheck,
    Target,
    WeightSource,
    digest_file,
    save_manifest,
)
from seekforge.formats.engine.ranks import Ranks
from seekforge.formats.int_quant import Quantization
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import GraphIO, Program, listed_files, save_bindings
from seekforge.formats.targets import TargetConfig
from seekforge.formats.weight_recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What a backend made of a program. Fields without a word here are those of the manifest.

    Attributes:
        target: the target as options changed it.
        kv_format: the format of the caches.
        graphs: graph -> its inputs and outputs, its file and the digest of that.
        bindings: graph -> weight or constant -> how it comes from the checkpoint.
        files: what the backend wrote into the folder, relative to it: every file that the engine needs.
        versions: versions of the libraries that took part.
        options: how it was built, for people, behind Python and platform.
    """

    target: TargetConfig
    limits: Limits
    kv_format: Literal["f32", "bf16", "fp8_ds"]
    graphs: dict[str, GraphIO]
    stages: dict[str, tuple[GraphIO, ...]] = field(default_factory=dict)
    bindings: Mapping[str, Mapping[str, Recipe]]
    files: Sequence[str]
    versions: dict[str, str]
    runtime_versions: dict[str, str] = field(default_factory=dict)
    options: Mapping[str, Any]
    self_check: SelfCheck | None = None
    weights: WeightSource | None = None
    plugins: dict[str, PluginUse] = field(default_factory=dict)
    profiles: dict[str, dict[str, dict[str, tuple[tuple[int, ...], ...]]]] = field(default_factory=dict)
    min_driver: dict[str, int] = field(default_factory=dict)
    capturable: dict[str, bool] = field(default_factory=dict)
    audit: Audit | None = None
    quantization: Quantization | None = None
    ranks: Ranks | None = None


def write_engine(
    folder: Path, parts: EngineParts, *, program_folder: Path, program: Program, config: ModelConfig
) -> Manifest:
    """Complete an engine's folder and seal it.

    Args:
        folder: the engine, with the files that the backend wrote.
        parts: what the backend made.
        program_folder: the program that it was made of.
        program: program.json of that folder.
        config: the program's config, parsed.

    Returns:
        The manifest, as it was written.

    Raises:
        ProgramError: a tokenizer or chat file of the program is missing, or is none of those files.
    """
    text_files = _copy_text_files(program, program_folder, folder)
    save_bindings(folder, parts.bindings)
    _write_target(folder, parts.target, parts.limits)
    generation = read_generation(program_folder, config)
    manifest = Manifest(
        format=ENGINE_FORMAT,
        seekforge_version=importlib.metadata.version("seekforge"),
        target=Target(
            name=parts.target.name,
            backend=parts.target.backend,
            sm=parts.target.sm,
            sms=parts.target.sms,
            provider=parts.target.provider,
        ),
        versions=parts.versions,
        runtime_versions=parts.runtime_versions,
        program_sha256=sha256_file(program_folder / "program.json"),
        numerics=program.numerics,
        layer_range=program.layer_range,
        graphs=parts.graphs,
        stages=parts.stages,
        cache=_cache(config, parts),
        limits=parts.limits,
        vocab_size=config.vocab_size,
        num_top_logits=config.num_top_logits,
        bos_token_id=config.bos_token_id,
        eos_token_id=as_written(generation.eos_token_ids),
        generation=generation.defaults,
        tokenizer="tokenizer.json",
        files=tuple(digest_file(folder, name) for name in (*text_files, "bindings.json", TARGET, *parts.files)),
        self_check=parts.self_check,
        config=program.config,
        build={"python": platform.python_version(), "platform": platform.platform(), **parts.options},
        weights=parts.weights,
        plugins=parts.plugins,
        profiles=parts.profiles,
        min_driver=parts.min_driver,
        capturable=parts.capturable,
        audit=parts.audit,
        quantization=parts.quantization,
        ranks=parts.ranks,
    )
    return save_manifest(folder, manifest)


def _cache(config: ModelConfig, parts: EngineParts) -> Cache:
    layers = [int(spec.name.partition(".")[2]) for spec in parts.graphs["model"].with_role("cache")]
    cache = Cache(
        block_size=BLOCK_SIZE,
        layers=tuple(dict.fromkeys(layers)),
        mtp_layer=config.mtp_layer if "mtp" in parts.graphs else None,
        kv_format=parts.kv_format,
        latent_dim=config.latent_dim,
        index_dim=config.index_head_dim,
        bytes_per_block=0,
    )
    return cache.model_copy(update={"bytes_per_block": cache_block_bytes(parts.graphs.values(), cache)})


def _write_target(folder: Path, target: TargetConfig, limits: Limits) -> None:
    """Write the target as options changed it, with the engine's own limits: it builds the same engine again."""
    effective = target.model_dump(mode="json") | {"limits": limits.model_dump()}
    text = yaml.safe_dump(effective, sort_keys=False, allow_unicode=True)
    (folder / TARGET).write_text(text, encoding="utf-8")


def _copy_text_files(program: Program, program_folder: Path, folder: Path) -> list[str]:
    """Copy tokenizer files into an engine's folder and return their names.

    Raises:
        ProgramError: one is missing, or is none of those files: nothing else may be put into an engine.
    """
    for source in listed_files(program_folder, program):
        try:
            (folder / source.name).write_bytes(read_bytes(source, most=LISTING_BYTES))
        except OSError as error:
            if error.filename is None or Path(os.fsdecode(error.filename)) != source:
                raise  # of the engine's folder
            raise ProgramError(f"{source}: cannot be read ({error.strerror}); export the program again") from None
    return list(program.files)
