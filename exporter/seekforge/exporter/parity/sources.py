"""The ways to compare: an engine with PyTorch, with transformers, with another engine; two dumps; PyTorch's side alone.

What can be refused is refused here before anything is run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from seekforge.common.errors import ConfigError, OptionError, OutputError
from seekforge.common.paths import real_path
from seekforge.common.temporary import temporary_folder
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.check import Noise, Result, check_engine, conclude
from seekforge.exporter.parity.compare.dumps import check_comparable, check_pair
from seekforge.exporter.parity.compare.operations import OpRecord
from seekforge.exporter.parity.inputs import ParityOptions, need_checkpoint, numerics_of, open_source, plan_of, range_of
from seekforge.exporter.parity.sides.engine import EngineSide
from seekforge.exporter.parity.sides.transformers import check_installed, write_oracle_dump
from seekforge.exporter.parity.torch_walks import Walker, sensitivity, without
from seekforge.exporter.parity.write_self_check import stored_step
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import NVFP4_EXPERTS, Dump, Side
from seekforge.formats.engine.manifest import MANIFEST
from seekforge.formats.numerics import EXACT, NUMERICS, Numerics, numerics_from_dict
from seekforge.formats.parity_steps import ParitySteps

Say = Callable[[str], None]


def from_engine(engine: Path, options: ParityOptions, work: Path, stages: Say) -> Result:
    """Run an engine, and compare it with what `options.against` names; dumps go to `work`.

    Raises:
        OptionError, ConfigError, OutputError, EnvironmentFault: the options cannot be met; before anything runs.
    """
    if options.against == "transformers":
        check_installed()
    side = EngineSide(engine, work, options.threads, options.checkpoint)
    manifest = side.manifest
    config = ModelConfig.parse(manifest.config, str(engine / MANIFEST))
    sides = [side]
    if options.against not in ("torch", "transformers"):
        if not (Path(options.against) / MANIFEST).is_file():
            raise ConfigError(f"--against is {options.against!r}, expected torch, transformers, or an engine's folder")
        sides.append(EngineSide(Path(options.against), work, options.threads, options.checkpoint))
        check_comparable(manifest.config, sides[1].manifest.config, (str(engine), options.against))
    plan = plan_of(
        options,
        config,
        engine / manifest.tokenizer,
        has_mtp=all("mtp" in one.manifest.graphs for one in sides),
        longest=min(one.manifest.limits.max_model_len for one in sides),
    )
    settings = Settings(
        config,
        numerics_of(options, manifest.numerics),
        manifest.build.get("activations", "bf16"),
        nvfp4_experts=manifest.build.get("precision") == NVFP4_EXPERTS,
    )
    if options.write_self_check:
        _check_storable(side, options, plan)
    (work / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
    if options.against == "torch":
        return _with_torch(side, plan, settings, options, work, stages)
    if options.against == "transformers":
        return _with_transformers(side, plan, settings, options, work, stages)
    return _two_engines(sides, plan, settings, options, work, stages)


def _check_storable(side: EngineSide, options: ParityOptions, plan: ParitySteps) -> None:
    """Refuse a self-check that could not be stored, before it is earned."""
    if side.layers is not None or options.layers is not None:
        raise ConfigError("--write-self-check stores logits of a whole model; leave out --layers, and take no stage")
    if not os.access(side.folder, os.W_OK):
        raise OutputError(f"{side.folder}: cannot be written, and --write-self-check changes its manifest")
    stored_step(plan)


def _with_torch(
    side: EngineSide, plan: ParitySteps, settings: Settings, options: ParityOptions, work: Path, stages: Say
) -> Result:
    folder = need_checkpoint(options, "--against torch")
    layers = range_of(options, settings.config)
    # the price of codes is measured with the engine's own layers, that of numerics in PyTorch
    other = numerics_from_dict(side.manifest.numerics)
    codes = side.has_codes and other.rounds_like(settings.numerics)
    base = EXACT if settings.numerics.rounds_like(other) else settings.numerics
    if options.sensitivity and not codes and base.rounds_like(other):
        raise ConfigError("--sensitivity: the engine computes exactly, no layer costs anything")
    with open_source(folder, settings.config) as source:
        walker = Walker(settings, source, real_path(folder).name, stages)
        result = check_engine(
            side,
            walker,
            plan,
            work=work,
            layers=layers,
            max_dump_bytes=options.max_dump_size,
            max_kl=options.max_kl,
            costs=options.sensitivity,
        )
        if options.sensitivity and codes and not result.sensitivity:
            result.notes.append(
                "what the codes of each layer cost is measured with all layers from the first on in memory: leave out "
                "--layers, or give more --max-dump-size"
            )
        elif options.sensitivity and not codes:
            result.sensitivity = _sensitivity(walker, plan, base, other, layers, work)
            if side.has_codes:
                result.notes.append("sensitivity is that of numerics alone: codes of weights are left out of it")
    return result


def _sensitivity(
    walker: Walker, plan: ParitySteps, base: Numerics, other: Numerics, layers: tuple[int, int] | None, work: Path
) -> dict[int, float]:
    """Run each layer alone in the engine's numerics, the others in the reference's (exact, where both are the same)."""
    settings = walker.settings
    start, stop = layers or (0, settings.config.num_hidden_layers)
    exact = Walker(replace(settings, numerics=base), walker.source, walker.name, walker.progress)
    return sensitivity(exact, plan, other=other, work=work, layers=range(start, stop))


def _with_transformers(
    side: EngineSide, plan: ParitySteps, settings: Settings, options: ParityOptions, work: Path, stages: Say
) -> Result:
    folder = need_checkpoint(options, "--against transformers")
    stages("transformers")
    (work / "reference").mkdir()
    with (
        open_source(folder, settings.config) as source,
        temporary_folder("seekforge-oracle") as copy,
    ):
        reference = write_oracle_dump(folder, source, plan, work / "reference", copy)
    stages(f"engine {side.folder.name}")
    judged = side.dump(plan, work / "judged", [tap for tap in side.taps if tap.startswith(("hidden", "resid"))])
    same = numerics_from_dict(side.manifest.numerics).rounds_like(EXACT)
    return conclude(judged, reference, None, [], same=same, max_kl=options.max_kl, num_runs=1)


def _two_engines(
    sides: Sequence[EngineSide], plan: ParitySteps, settings: Settings, options: ParityOptions, work: Path, stages: Say
) -> Result:
    """Both engines run; with a checkpoint, PyTorch judges the operations of both and measures the noise."""
    dumps: list[Dump] = []
    for side, name in zip(sides, ("judged", "reference"), strict=True):
        stages(f"engine {side.folder.name}")
        dumps.append(side.dump(plan, work / name, side.taps))
    records: list[OpRecord] = []
    noise: Noise | None = None
    notes: list[str] = []
    numerics = [numerics_from_dict(dump.side.numerics) for dump in dumps]
    if options.checkpoint is None:
        notes.append("without --checkpoint operations were not judged, and noise was not measured")
    else:
        with open_source(options.checkpoint, settings.config) as source:
            walk = work / "walk"
            walk.mkdir()
            name = real_path(options.checkpoint).name
            records = Walker(settings, source, name, stages).judge_dump(dumps[0], walk, sides[0].ranks)
            other = _settings_of(dumps[1].side, settings.config, numerics[1])
            records += Walker(other, source, name, stages).judge_only(dumps[1], ranks=sides[1].ranks)
            noise = (Dump.open(walk / "noise"), Dump.open(walk / "reference"))
    stages("compare")
    same = numerics[0] == numerics[1]
    return conclude(dumps[0], dumps[1], noise, records, same=same, max_kl=options.max_kl, notes=notes, num_runs=2)


def _settings_of(side: Side, config: ModelConfig, numerics: Numerics) -> Settings:
    """Return how PyTorch computes beside the maker of a dump: with its types and its weights."""
    nvfp4 = side.weights == NVFP4_EXPERTS
    return Settings(config, numerics, side.activations, nvfp4_experts=nvfp4)  # pyright: ignore


def from_dumps(folders: Sequence[Path], options: ParityOptions, work: Path, stages: Say) -> Result:
    """Compare two dumps, or one with PyTorch; with a checkpoint, PyTorch judges the operations of the first.

    Raises:
        OptionError, ConfigError: they do not go together, or a checkpoint is missing.
    """
    judged = Dump.open(folders[0])
    second = Dump.open(folders[1]) if len(folders) == 2 else None
    if options.checkpoint is None and second is None:
        raise OptionError("one --from-dump needs --checkpoint, or a second --from-dump to compare with")
    (work / "plan.json").write_text(judged.plan.model_dump_json(), encoding="utf-8")
    config = ModelConfig.parse(judged.side.config, str(folders[0]))
    settings = _settings_of(judged.side, config, numerics_of(options, judged.side.numerics))
    records: list[OpRecord] = []
    noise: Noise | None = None
    notes: list[str] = []
    if second is not None:
        check_pair(judged, second)
    if options.checkpoint is not None:
        with open_source(options.checkpoint, config) as source:
            name = real_path(options.checkpoint).name
            records = Walker(settings, source, name, stages).judge_dump(judged, work)
        noise = Dump.open(work / "noise")
    if second is None:
        reference = Dump.open(work / "reference")
    else:
        reference, beside = second, real_path(folders[1]).parent / "noise"
        if noise is not None:
            noise = (noise, Dump.open(work / "reference"))
        elif (beside / "dump.json").is_file():
            noise = Dump.open(beside)  # written with the reference by --save
        else:
            notes.append("no noise was measured: there is none beside the second dump, and no --checkpoint")
    stages("compare")
    same = numerics_from_dict(judged.side.numerics).rounds_like(numerics_from_dict(reference.side.numerics))
    return conclude(judged, reference, noise, records, same=same, max_kl=options.max_kl, notes=notes)


def reference_only(options: ParityOptions, save: Path | None, work: Path, stages: Say) -> None:
    """Write the PyTorch side alone, to be compared with an engine's dump made elsewhere.

    Raises:
        OptionError, ConfigError: there is no `save` or no checkpoint, or the steps cannot be.
    """
    if save is None:
        raise OptionError("without ENGINE and --from-dump there is nothing to compare; --save writes PyTorch's side")
    folder = need_checkpoint(options, "--save without ENGINE")
    with open_checkpoint(folder) as opened:
        config = opened.config
    plan = plan_of(
        options,
        config,
        folder / "tokenizer.json",
        has_mtp=config.mtp_layer is not None,
        longest=config.max_position_embeddings,
    )
    (work / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
    settings = Settings(config, without(NUMERICS[options.numerics or "fp8"], options.without), "f32")
    with open_source(folder, config) as source:
        Walker(settings, source, real_path(folder).name, stages).run(plan, work)
