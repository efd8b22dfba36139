"""The order of work of a parity check: engine side, PyTorch side, comparison, first divergence."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seekforge.exporter.model.step import Settings
from seekforge.exporter.parity.compare import Comparison, compare
from seekforge.exporter.parity.local import LocalJudge, OpRecord
from seekforge.exporter.parity.localise import first_bad_layer, segment_is_bad
from seekforge.exporter.parity.reference import Reference, Stream, noise_stream
from seekforge.exporter.parity.taps import HANDOVER, available_taps, layer_points, point_width, tapped_copy
from seekforge.exporter.parity.verdict import PERTURBATION, Finding, Gate, first_divergence, judge
from seekforge.plugins.errors import ConfigError, EngineError
from seekforge.plugins.formats.bindings import TensorSource
from seekforge.plugins.formats.dump import Dump, DumpWriter, Plan, Side
from seekforge.plugins.formats.manifest import load_manifest
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.numerics import Numerics, numerics_from_dict

Say = Callable[[str], None]
#: The perturbed run, and what it is to be compared with where that is not the reference.
Noise = Dump | tuple[Dump, Dump]


@dataclass
class Result:
    """A finished check.

    Attributes:
        judged, reference: who was compared.
        comparison, gates, records, finding: what was found.
        passed: all gates.
        sensitivity: layer -> mean KL when that layer alone is computed in the engine's numerics.
        num_engine_runs: how often the engine was run.
        notes: what the reader should know, such as what was not looked at.
    """

    judged: Side
    reference: Side
    plan: Plan
    comparison: Comparison
    gates: list[Gate]
    records: list[OpRecord]
    finding: Finding | None
    passed: bool
    num_engine_runs: int = 0
    notes: list[str] = field(default_factory=list)
    sensitivity: dict[int, float] = field(default_factory=dict)


class EngineSide:
    """Makes dumps of one engine, each in a process of the runtime.

    Args:
        folder: the engine.
        work: a folder for tapped copies.
        threads: CPU threads for one operator.
    """

    def __init__(self, folder: Path, work: Path, threads: int | None = None) -> None:
        self.folder, self.work, self.threads = folder, work, threads
        self.manifest = load_manifest(folder)
        self.taps = available_taps(folder)
        self.num_runs = 0

    def dump(self, plan: Plan, out: Path, taps: Collection[str]) -> Dump:
        """Run a plan and keep `taps` beside selections, results and caches.

        Raises:
            EngineError: the runtime refused, with its own words.
        """
        engine, copy = self.folder, None
        given = {spec.name for face in self.manifest.graphs.values() for spec in face.outputs}
        if not set(taps) <= given:
            copy = self.work / f"tapped-{self.num_runs}"
            engine = tapped_copy(self.folder, copy, taps)
        self.num_runs += 1
        plan_file = self.work / "plan.json"
        plan_file.write_text(plan.model_dump_json(), encoding="utf-8")
        selections = {name for name in given if name.startswith(("topk_indices.", "expert_ids."))}
        command = [sys.executable, "-m", "seekforge.runtime.dump_cli", str(engine), str(out), "--quiet", "--force"]
        command += ["--plan", str(plan_file), "--name", self.folder.resolve().name]
        command += ["--taps", ",".join([*selections, *taps])]
        if self.threads:
            command += ["--threads", str(self.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if copy is not None:
            shutil.rmtree(copy)
        if done.returncode != 0:
            line = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            raise EngineError(f"{self.folder}: the runtime could not run it: {line.removeprefix('error: ')}")
        return Dump.open(out)


def dump_bytes(plan: Plan, config: ModelConfig, layers: Sequence[int]) -> int:
    """Estimate the size of all taps of some layers."""
    tokens = dict.fromkeys(("model", "mtp"), 0)
    for _, _, step in plan.steps():
        tokens[step.graph] += len(step.tokens) * max(len(new) for new in step.tokens)
    per_token = sum(4 * point_width(config, point) for layer in layers for point in layer_points(config, layer))
    return per_token * max(tokens.values())


def check_engine(
    engine: EngineSide,
    plan: Plan,
    *,
    settings: Settings,
    source: TensorSource,
    work: Path,
    checkpoint_name: str,
    layers: tuple[int, int] | None = None,
    max_dump_bytes: int = 8 << 30,
    max_kl: float | None = None,
    progress: Say = lambda stage: None,
) -> Result:
    """Compare an engine with PyTorch.

    Args:
        engine: what is judged.
        plan: the steps.
        settings: numerics and activations of the PyTorch side.
        source: the checkpoint.
        work: folder for dumps: judged, reference, noise.
        checkpoint_name: what reports call the PyTorch side.
        layers: look at layers [a, b) only, from what the engine had at a.
        max_dump_bytes: above this, taps of all layers are not kept; the first bad layer is found by bisection.
        max_kl: gate when numerics differ.
        progress: told each stage.

    Raises:
        ConfigError, EngineError: see `Reference`, `EngineSide`.
    """
    config = settings.config
    shown = layers or (0, config.num_hidden_layers)
    numbers = [*range(*shown), *([config.mtp_layer] if layers is None and config.mtp_layer is not None else [])]
    wanted = [tap for tap in engine.taps if _layer(tap) in {*numbers, shown[1], config.num_hidden_layers + 1}]
    notes: list[str] = []
    size = dump_bytes(plan, config, numbers)
    fits = size <= max_dump_bytes
    if not wanted:
        notes.append("the engine shows no inner tensors: operations were not judged; build it with --taps to see them")
    elif not fits:
        ends = {shown[0], shown[1]}
        wanted = [tap for tap in wanted if _layer(tap) in ends and tap.startswith(HANDOVER)]
        notes.append(
            f"taps of all layers would take {size / 1e9:.1f} GB, allowed are {max_dump_bytes / 1e9:.1f} GB "
            "(--max-dump-gb): the first bad layer was searched by bisection, and only its inside was looked at"
        )
    progress(f"engine {engine.folder.name}")
    judged = engine.dump(plan, work / "judged", wanted)
    same = numerics_from_dict(judged.side.numerics) == settings.numerics
    records = _walk(settings, source, plan, judged, work, checkpoint_name, layers, progress, inside=fits, keep_all=fits)
    reference, noise = Dump.open(work / "reference"), Dump.open(work / "noise")
    if not fits and engine.taps:
        records = _bisect(engine, plan, settings, source, work, checkpoint_name, shown, progress, notes)
    progress("compare")
    return conclude(judged, reference, noise, records, same=same, max_kl=max_kl, notes=notes, num_runs=engine.num_runs)


def conclude(
    judged: Dump,
    reference: Dump,
    noise: Noise | None,
    records: Sequence[OpRecord],
    *,
    same: bool,
    max_kl: float | None = None,
    notes: Sequence[str] = (),
    num_runs: int = 0,
) -> Result:
    """Compare dumps, apply the gates, name the first divergence."""
    comparison = compare(judged, reference, noise)
    exact = judged.side.numerics.get("act_quant") == "none" and judged.side.activations == "f32"
    gates = judge(comparison, records, same_numerics=same, exact=exact, max_kl=max_kl)
    return Result(
        judged=judged.side,
        reference=reference.side,
        plan=judged.plan,
        comparison=comparison,
        gates=gates,
        records=list(records),
        finding=first_divergence(records) if same else None,
        passed=all(gate.passed for gate in gates),
        num_engine_runs=num_runs,
        notes=list(notes),
    )


def torch_side(settings: Settings, name: str, layers: tuple[int, int]) -> Side:
    """Describe the PyTorch model as the maker of a dump."""
    return Side(
        kind="torch",
        name=name,
        numerics=settings.numerics.to_dict(),
        activations=settings.dtype_name,
        layers=layers,
        config=settings.config.model_dump(mode="json"),
        versions={"torch": importlib.metadata.version("torch")},
    )


def _layer(tap: str) -> int:
    return int(tap.rpartition(".")[2])


def _walk(
    settings: Settings,
    source: TensorSource,
    plan: Plan,
    judged: Dump | None,
    work: Path,
    name: str,
    layers: tuple[int, int] | None,
    progress: Say,
    *,
    inside: bool = True,
    keep_all: bool = True,
) -> list[OpRecord]:
    """Run PyTorch and its perturbed twin into `work`, and judge the operations that the engine's dump shows."""
    streams = []
    side = torch_side(settings, name, layers or (0, settings.config.num_hidden_layers))
    for folder, perturbation in (("reference", 0.0), ("noise", PERTURBATION)):
        shutil.rmtree(work / folder, ignore_errors=True)
        (work / folder).mkdir(parents=True)
        writer = DumpWriter(work / folder, side, plan)
        if perturbation or not keep_all:
            streams.append(noise_stream(writer, perturbation))
        else:
            streams.append(Stream(writer))
    local = None
    if judged is not None and inside:
        local = LocalJudge(judged, settings.numerics, settings.dtype_name)
    walk = Reference(settings, source, plan, streams=streams, subject=judged, judge=local, progress=progress)
    walk.run(layers)
    for stream in streams:
        stream.writer.close()
    return [] if local is None else local.finish()


def write_reference(settings: Settings, source: TensorSource, plan: Plan, work: Path, name: str, progress: Say) -> None:
    """Write the PyTorch side's dumps, `reference` and `noise`, for a comparison elsewhere."""
    _walk(settings, source, plan, None, work, name, None, progress)


def judge_dump(
    judged: Dump, *, settings: Settings, source: TensorSource, work: Path, name: str, progress: Say
) -> list[OpRecord]:
    """Judge the operations that a dump shows, and write the PyTorch side's dumps beside."""
    layers = None if judged.side.layers == (0, settings.config.num_hidden_layers) else judged.side.layers
    return _walk(settings, source, judged.plan, judged, work, name, layers, progress)


def judge_only(
    judged: Dump, *, settings: Settings, source: TensorSource, progress: Say = lambda stage: None
) -> list[OpRecord]:
    """Judge the operations that a dump shows by their own inputs; no model is run."""
    local = LocalJudge(judged, settings.numerics, settings.dtype_name)
    Reference(settings, source, judged.plan, subject=judged, judge=local, progress=progress).run()
    return local.finish()


def _bisect(
    engine: EngineSide,
    plan: Plan,
    settings: Settings,
    source: TensorSource,
    work: Path,
    name: str,
    shown: tuple[int, int],
    progress: Say,
    notes: list[str],
) -> list[OpRecord]:
    """Find the first bad layer, then judge its inside and the ends of the model."""

    probe = work / "probe"

    def bad(start: int, stop: int) -> bool:
        progress(f"layers {start}-{stop - 1} from the engine's own input")
        taps = [f"{point}.{layer}" for layer in (start, stop) for point in HANDOVER]
        found = engine.dump(plan, probe / "judged", [tap for tap in taps if tap in engine.taps])
        _walk(settings, source, plan, found, probe, name, (start, stop), progress, inside=False, keep_all=False)
        return segment_is_bad(found, Dump.open(probe / "reference"), Dump.open(probe / "noise"), stop)

    try:
        layer = first_bad_layer(shown, bad)
        if layer is None:
            notes.append("no range of layers differs by more than noise does; give more --max-dump-gb to judge each")
            return []
        progress(f"inside of layer {layer}")
        taps = [tap for tap in engine.taps if _layer(tap) == layer or (_layer(tap) == layer + 1 and "_norm" not in tap)]
        found = engine.dump(plan, probe / "judged", [t for t in taps if _layer(t) == layer or t.startswith(HANDOVER)])
        notes.append(f"layer {layer} was found in {engine.num_runs} runs of the engine")
        local = LocalJudge(found, settings.numerics, settings.dtype_name)
        only = (layer, layer + 1)
        Reference(settings, source, plan, subject=found, judge=local, progress=progress).run(only)
        return local.finish()
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def sensitivity(
    plan: Plan,
    *,
    base: Settings,
    other: Numerics,
    source: TensorSource,
    work: Path,
    layers: Sequence[int],
    progress: Say,
) -> dict[int, float]:
    """Return layer -> mean KL of the next token when that layer alone computes in `other` numerics.

    One pass over the weights: each layer has a run of its own beside the base run. Memory grows with the number
    of layers by their hidden states.
    """
    from seekforge.exporter.parity.compare import compare as compare_dumps

    side = torch_side(base, "sensitivity", (0, base.config.num_hidden_layers))
    streams = []
    for name, numerics in [("base", {}), *((f"{layer}", {layer: other}) for layer in layers)]:
        folder = work / "sensitivity" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        streams.append(Stream(DumpWriter(folder, side, plan), 0.0, (), numerics))
    Reference(base, source, plan, streams=streams, progress=progress).run()
    for stream in streams:
        stream.writer.close()
    result = {}
    reference = Dump.open(work / "sensitivity" / "base")
    for layer in layers:
        cases = compare_dumps(Dump.open(work / "sensitivity" / str(layer)), reference).cases
        rows = sum(len(case.kl) for case in cases)
        result[layer] = float(sum(case.kl.sum() for case in cases)) / max(1, rows)
    shutil.rmtree(work / "sensitivity")
    return result


def without(numerics: Numerics, names: Sequence[str]) -> Numerics:
    """Return numerics with some roundings switched off.

    Raises:
        ConfigError: a name is no rounding.
    """
    off = {"act_quant": "none", "kv_fp8": False, "hadamard": False, "indexer_fp8": False}
    unknown = [name for name in names if name not in off]
    if unknown:
        raise ConfigError(f"--without {unknown[0]}: expected some of {', '.join(off)}")
    if not names:
        return numerics
    values = numerics.to_dict() | {name: off[name] for name in names}
    return numerics_from_dict(values | {"name": f"{numerics.name} without {', '.join(names)}"})
