"""The order of work of a parity check: engine side, PyTorch side, comparison, first divergence."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seekforge.common.errors import ConfigError
from seekforge.exporter.parity.compare.dumps import Comparison, compare
from seekforge.exporter.parity.compare.operations import OpRecord
from seekforge.exporter.parity.gates import WHOLE_RUN, Finding, Gate, first_divergence, judge
from seekforge.exporter.parity.locate.bisect import first_bad_layer, segment_is_bad
from seekforge.exporter.parity.locate.layers import FedLayer, judge_layers, look_inside
from seekforge.exporter.parity.sides.engine import EngineSide
from seekforge.exporter.parity.sides.torch_streams import NOISE_POINTS
from seekforge.exporter.parity.torch_walks import NOISE, NUDGED, REFERENCE, Walker, sensitivity_of_engine
from seekforge.exporter.program.taps import layer_points, point_width
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import CHECKPOINT, Dump, Side
from seekforge.formats.numerics import numerics_from_dict
from seekforge.formats.parity_steps import ParitySteps
from seekforge.formats.step_io import INTERMEDIATE_TENSORS, TOPK_INDICES

#: The perturbed run, and what it is to be compared with where that is not the reference.
Noise = Dump | tuple[Dump, Dump]


@dataclass
class Result:
    """A finished check.

    Attributes:
        judged: the side that was judged.
        reference: the side that it was compared with.
        plan: the steps that both ran.
        comparison: how far the two are apart.
        gates: the conditions, each passed or failed.
        records: the operations, each judged by its own inputs.
        finding: the first divergence; None where there is none.
        passed: whether all gates were passed.
        num_engine_runs: how often the engine was run.
        notes: what the reader should know, such as what was not looked at.
        sensitivity: layer -> mean KL when that layer alone is computed in the engine's numerics.
        fed: the layers of the engine on PyTorch's inputs.
    """

    judged: Side
    reference: Side
    plan: ParitySteps
    comparison: Comparison
    gates: list[Gate]
    records: list[OpRecord]
    finding: Finding | None
    passed: bool
    num_engine_runs: int = 0
    notes: list[str] = field(default_factory=list)
    sensitivity: dict[int, float] = field(default_factory=dict)
    fed: list[FedLayer] = field(default_factory=list)


def dump_bytes(
    plan: ParitySteps, config: ModelConfig, layers: Sequence[int], points: Sequence[str] | None = None
) -> int:
    """Estimate the size of taps of some layers: of all their points, or of `points`."""
    tokens = dict.fromkeys(("model", "mtp"), 0)
    for _, _, step in plan.steps():
        tokens[step.graph] += len(step.tokens) * max(len(new) for new in step.tokens)
    per_token = sum(
        4 * point_width(config, point) for layer in layers for point in points or layer_points(config, layer)
    )
    return per_token * max(tokens.values())


def check_engine(
    engine: EngineSide,
    walker: Walker,
    plan: ParitySteps,
    *,
    work: Path,
    layers: tuple[int, int] | None = None,
    max_dump_bytes: int = 8 << 30,
    max_kl: float | None = None,
    costs: bool = False,
) -> Result:
    """Compare an engine with PyTorch.

    Args:
        engine: the side that is judged.
        walker: the PyTorch side.
        plan: the steps.
        work: the folder for dumps: judged, reference, noise.
        layers: look at layers [a, b) only, from what the engine had at a.
        max_dump_bytes: above this, taps of all layers are not kept; the first bad layer is found by bisection.
        max_kl: the largest mean KL that passes when numerics or weights differ.
        costs: also tell what each layer of the engine costs alone, where it can be cut.

    Raises:
        ConfigError, EngineError: see `Reference`, `EngineSide`.
    """
    config, progress = walker.settings.config, walker.progress
    inputs: Dump | None = None
    if engine.layers is not None:
        layers = layers or engine.layers
        if layers != engine.layers:
            raise ConfigError(f"--layers: the engine is a stage of layers {_words(engine.layers)}; leave it out")
        inputs = _before(walker, plan, layers[0], work / "inputs")
    shown = layers or (0, config.num_hidden_layers)
    numbers = [*range(*shown), *([config.mtp_layer] if layers is None and config.mtp_layer is not None else [])]
    wanted = [tap for tap in engine.taps if _layer(tap) in {*numbers, shown[1], config.num_hidden_layers + 1}]
    notes: list[str] = []
    size = dump_bytes(plan, config, numbers)
    fits = size <= max_dump_bytes
    narrow = fits or dump_bytes(plan, config, numbers, NOISE_POINTS) <= max_dump_bytes
    ends = {shown[0], shown[1]}
    if not wanted:
        remedy = "build it with --taps" if engine.manifest.ranks is None else "build the program of one rank"
        notes.append(f"the engine shows no inner tensors: operations were not judged; {remedy} to see them")
    elif not fits:
        wanted = [tap for tap in wanted if _layer(tap) in ends and tap.startswith(INTERMEDIATE_TENSORS)]
        notes.append(
            f"taps of all layers would take {size / 1e9:.3g} GB, allowed are {max_dump_bytes / 1e9:.3g} GB "
            "(--max-dump-size): the first bad layer was searched by bisection, and only its inside was looked at"
        )
    progress(f"engine {engine.folder.name}")
    judged = engine.dump(plan, work / "judged", wanted, selections=narrow, inputs=inputs)
    same = numerics_from_dict(judged.side.numerics).rounds_like(walker.settings.numerics)
    # without roundings only choices by noise move a row, and those behind it that read it: PyTorch follows them
    follow = same and _is_exact(judged.side) and judged.side.weights == CHECKPOINT
    feed = fits and same and engine.opens and inputs is None and shown[0] == 0
    records = walker.run(
        plan,
        work,
        layers=layers,
        subject=judged,
        inside=fits,
        follow=follow,
        kinds=(REFERENCE, NOISE, *([NUDGED] if feed else [])),
        points=None if fits else NOISE_POINTS if narrow else INTERMEDIATE_TENSORS,
        kept_layers=None if narrow else ends,
        ranks=engine.ranks,
    )
    reference, noise = Dump.open(work / REFERENCE), Dump.open(work / NOISE)
    fed: list[FedLayer] = []
    sensitivity: dict[int, float] = {}
    if feed:
        fed = _feed(engine, walker, reference, shown, work, inside=judged.side.weights == CHECKPOINT)
        if costs and judged.side.weights != CHECKPOINT:
            sensitivity = sensitivity_of_engine(walker, plan, Dump.open(work / "fed"), work)
        shutil.rmtree(work / "fed")
    elif not fits and engine.taps:
        records, fed = _bisect(engine, walker, plan, work, shown, notes, inputs)
    if same and not fed and engine.taps and not engine.opens:
        what = "the engine is compiled" if engine.manifest.ranks is None else "ranks share the engine"
        notes.append(f"{what}: PyTorch ran on its inputs, its layers could not be run on PyTorch's")
    progress("compare")
    how = {"same": same, "max_kl": max_kl, "notes": notes, "num_runs": engine.num_runs, "fed": fed, "followed": follow}
    result = conclude(judged, reference, noise, records, **how)
    # where nothing is wrong in itself and yet the whole differs, it may be luck: noise is drawn again on few rows
    failed = {gate.name for gate in result.gates if not gate.passed}
    if failed and failed <= WHOLE_RUN and walker.draw_noise(plan, work, layers=layers, subject=judged):
        result = conclude(judged, reference, noise, records, **how)
    result.sensitivity = sensitivity
    return result


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
    fed: Sequence[FedLayer] = (),
    followed: bool = False,
) -> Result:
    """Compare dumps, apply the gates, name the first divergence."""
    comparison = compare(judged, reference, noise)
    same_weights = judged.side.weights == reference.side.weights
    gates = judge(
        comparison,
        records,
        fed,
        same_numerics=same,
        same_weights=same_weights,
        exact=_is_exact(judged.side),
        followed=followed,
        max_kl=max_kl,
    )
    return Result(
        judged=judged.side,
        reference=reference.side,
        plan=judged.plan,
        comparison=comparison,
        gates=gates,
        records=list(records),
        finding=first_divergence(records, fed if same_weights else ()) if same else None,
        passed=all(gate.passed for gate in gates),
        num_engine_runs=num_runs,
        notes=list(notes),
        fed=list(fed),
    )


def _is_exact(side: Side) -> bool:
    """Whether a side rounds nothing."""
    return side.numerics.get("act_quant") == "none" and side.activations == "f32"


def _layer(tap: str) -> int:
    return int(tap.rpartition(".")[2])


def _words(layers: tuple[int, int]) -> str:
    return f"{layers[0]}-{layers[1] - 1}"


def _before(walker: Walker, plan: ParitySteps, layer: int, work: Path) -> Dump | None:
    """Run PyTorch up to a layer, and return the dump of what goes into that."""
    if layer == 0:
        return None
    work.mkdir(exist_ok=True)
    points = (*INTERMEDIATE_TENSORS, TOPK_INDICES)
    walker.run(plan, work, layers=(0, layer), kinds=(REFERENCE,), points=points, kept_layers=(layer,))
    return Dump.open(work / REFERENCE)


def _feed(
    engine: EngineSide, walker: Walker, reference: Dump, layers: tuple[int, int], work: Path, *, inside: bool
) -> list[FedLayer]:
    """Run all layers of the engine on PyTorch's inputs; if `inside`, look into the first that differs."""
    walker.progress("the engine's layers on PyTorch's inputs")
    judged = engine.dump_fed(reference, work / "fed", layers)
    fed = judge_layers(judged, reference, Dump.open(work / NUDGED))
    shutil.rmtree(work / NUDGED)
    for i, one in enumerate(fed if inside else ()):
        if one.bad and one.layer < layers[1]:
            walker.progress(f"inside of layer {one.layer} on PyTorch's inputs")
            fed[i] = look_inside(engine, walker, reference, one.layer, work / "probe")
            break
    return fed


def _bisect(
    engine: EngineSide,
    walker: Walker,
    plan: ParitySteps,
    work: Path,
    shown: tuple[int, int],
    notes: list[str],
    stage_input: Dump | None,
) -> tuple[list[OpRecord], list[FedLayer]]:
    """Find the first bad layer, then judge its inside in both directions."""
    probe = work / "probe"

    def bad(start: int, stop: int) -> bool:
        walker.progress(f"layers {start}-{stop - 1} from the engine's own input")
        taps = [f"{point}.{layer}" for layer in (start, stop) for point in INTERMEDIATE_TENSORS]
        taps = [tap for tap in taps if tap in engine.taps]
        if walker.settings.config.shares_indices(start):
            taps.append(f"{TOPK_INDICES}.{walker.settings.config.index_source(start)}")
        judged = engine.dump(plan, probe / "judged", taps, selections=False, inputs=stage_input)
        walker.run(plan, probe, layers=(start, stop), subject=judged, points=INTERMEDIATE_TENSORS, kept_layers=(stop,))
        return segment_is_bad(judged, Dump.open(probe / REFERENCE), Dump.open(probe / NOISE), stop)

    try:
        layer = first_bad_layer(shown, bad)
        if layer is None:
            notes.append("no range of layers differs by more than noise does; give more --max-dump-size to judge each")
            return [], []
        walker.progress(f"inside of layer {layer}")
        taps = [tap for tap in engine.taps if _layer(tap) == layer]
        taps += [tap for tap in engine.taps if _layer(tap) == layer + 1 and tap.startswith(INTERMEDIATE_TENSORS)]
        judged = engine.dump(plan, probe / "judged", taps, inputs=stage_input)
        records = walker.judge_only(judged, (layer, layer + 1), engine.ranks)
        stood = "was found" if any(record.failed for record in records) else "stood out, but is right inside,"
        notes.append(f"layer {layer} {stood} in {engine.num_runs} runs of the engine")
        fed: list[FedLayer] = []
        if engine.opens and stage_input is None and shown[0] == 0:
            walker.progress(f"layer {layer} on PyTorch's input")
            reference = Dump.open(work / REFERENCE)
            needed = [*INTERMEDIATE_TENSORS, *([TOPK_INDICES] if walker.settings.config.shares_indices(layer) else [])]
            if layer > 0 and not reference.has(0, *(f"{point}.{layer}" for point in needed)):
                reference = _before(walker, plan, layer, probe) or reference
            fed = [look_inside(engine, walker, reference, layer, work / "fed")]
        return records, fed
    finally:
        shutil.rmtree(probe, ignore_errors=True)
