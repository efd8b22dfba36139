"""Walks of the PyTorch side: which runs one pass over the weights makes, and what each of them keeps."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from seekforge.common.errors import ConfigError
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.compare.dumps import compare, draw_folder
from seekforge.exporter.parity.compare.following import Follower
from seekforge.exporter.parity.compare.operations import LocalJudge, OpRecord
from seekforge.exporter.parity.sides.rank_dump import RankDump
from seekforge.exporter.parity.sides.torch_reference import Reference
from seekforge.exporter.parity.sides.torch_streams import NOISE_POINTS, Stream
from seekforge.exporter.tolerances import PERTURBATION, PERTURBATION_BF16
from seekforge.formats.dump import CHECKPOINT, NVFP4_EXPERTS, Dump, DumpWriter, Side
from seekforge.formats.numerics import Numerics, numerics_from_dict
from seekforge.formats.parity_steps import ParitySteps, step_inputs
from seekforge.formats.step_io import INTERMEDIATE_TENSORS
from seekforge.formats.weight_recipes import TensorSource

Say = Callable[[str], None]
#: What a pass writes: the model; the same from embeddings changed a little; each layer from inputs changed a little.
REFERENCE, NOISE, NUDGED = "reference", "noise", "nudged"


def torch_side(settings: Settings, name: str, layers: tuple[int, int]) -> Side:
    """Describe the PyTorch model as the maker of a dump."""
    return Side(
        kind="torch",
        name=name,
        numerics=settings.numerics.model_dump(),
        activations=settings.dtype_name,
        layers=layers,
        config=settings.config.model_dump(mode="json"),
        versions={"torch": importlib.metadata.version("torch")},
        weights=NVFP4_EXPERTS if settings.nvfp4_experts else CHECKPOINT,
    )


#: On few rows luck decides which roundings flip: noise is drawn again, logits alone, until it has so many rows.
_DRAWN_ROWS, _MOST_DRAWS = 96, 3


def _num_draws(plan: ParitySteps) -> int:
    rows = sum(len(step_inputs(case, step).logits_index) for _, case, step in plan.steps())
    return max(1, min(_MOST_DRAWS, -(-_DRAWN_ROWS // max(1, rows))))


class Walker:
    """Runs PyTorch for one check.

    Args:
        settings: the numerics and activations.
        source: the checkpoint.
        name: what reports call this side.
        progress: told each layer.
    """

    def __init__(self, settings: Settings, source: TensorSource, name: str, progress: Say = lambda stage: None) -> None:
        self.settings, self.source, self.name, self.progress = settings, source, name, progress

    def run(
        self,
        plan: ParitySteps,
        work: Path,
        *,
        layers: tuple[int, int] | None = None,
        subject: Dump | None = None,
        inside: bool = False,
        follow: bool = False,
        kinds: Collection[str] = (REFERENCE, NOISE),
        points: Sequence[str] | None = None,
        kept_layers: Collection[int] | None = None,
        ranks: RankDump | None = None,
    ) -> list[OpRecord]:
        """Make one pass over the weights; dumps go to `work`/reference and so on.

        Args:
            plan: the steps.
            work: the folder of the dumps.
            layers: [a, b); None: the whole model.
            subject: an engine's dump: what goes into layer a, if that is not 0, and what is judged.
            inside: judge the operations that `subject` shows, each by its own inputs.
            follow: the reference and the noise go on with the keys and experts that `subject` chose, where these tie
                with their own but for noise: what such a choice leads to is then no difference of the two sides.
            kinds: which runs to make.
            points: what the reference keeps of each layer; None: all.
            kept_layers: the layers of which it and the noise keep that; None: all.
            ranks: what single ranks of the engine had that made `subject`; None: it has one.

        Returns:
            Records of the operations; empty if not `inside`.
        """
        side = torch_side(self.settings, self.name, layers or (0, self.settings.config.num_hidden_layers))
        change, follows = self._change, Follower(subject) if follow and subject is not None else None
        streams: dict[str, Stream] = {}
        for kind in kinds:
            shutil.rmtree(work / kind, ignore_errors=True)
            (work / kind).mkdir(parents=True)
            writer = DumpWriter(work / kind, side, plan)
            if kind == REFERENCE:
                streams[kind] = Stream(writer, points=points, layers=kept_layers, follows=follows)
            elif kind == NOISE:
                few = NOISE_POINTS if points is None else points
                streams[kind] = Stream(writer, change, points=few, layers=kept_layers, follows=follows)
            else:
                streams[kind] = Stream(writer, change, points=INTERMEDIATE_TENSORS, beside=streams[REFERENCE])
        local = None
        if inside:
            assert subject is not None
            local = LocalJudge(subject, self.settings.numerics, self.settings.dtype_name, ranks)
        Reference(
            self.settings,
            self.source,
            plan,
            streams=list(streams.values()),
            subject=subject,
            judge=local,
            progress=self.progress,
        ).run(layers)
        for stream in streams.values():
            stream.writer.close()
        return [] if local is None else local.finish()

    @property
    def _change(self) -> float:
        return PERTURBATION_BF16 if self.settings.dtype_name == "bf16" else PERTURBATION

    def draw_noise(
        self, plan: ParitySteps, work: Path, *, layers: tuple[int, int] | None = None, subject: Dump | None = None
    ) -> bool:
        """Draw the noise again, logits alone, into folders beside the first draw, if the plan has few rows.

        Args:
            plan: the steps of the run that made the first draw.
            work: its folder.
            layers: its layers.
            subject: its subject.

        Returns:
            Whether there are more draws now.
        """
        start, stop = layers or (0, self.settings.config.num_hidden_layers)
        draws = _num_draws(plan)
        if stop < self.settings.config.num_hidden_layers or draws == 1:  # no logits, or rows enough
            return False
        self.progress("few rows: PyTorch against itself again")
        side = torch_side(self.settings, self.name, (start, stop))
        streams: list[Stream] = []
        for draw in range(1, draws):
            folder = draw_folder(work / NOISE, draw)
            folder.mkdir()
            streams.append(Stream(DumpWriter(folder, side, plan), self._change, draw, points=()))
        Reference(self.settings, self.source, plan, streams=streams, subject=subject).run(layers)
        for stream in streams:
            stream.writer.close()
        return True

    def judge_only(
        self, judged: Dump, layers: tuple[int, int] | None = None, ranks: RankDump | None = None
    ) -> list[OpRecord]:
        """Judge the operations that a dump shows by their own inputs; no model is run."""
        return self.run(judged.plan, judged.folder, layers=layers, subject=judged, inside=True, kinds=(), ranks=ranks)

    def judge_dump(self, judged: Dump, work: Path, ranks: RankDump | None = None) -> list[OpRecord]:
        """Judge the operations that a dump shows, and write PyTorch's own dumps into `work`."""
        whole = (0, self.settings.config.num_hidden_layers)
        layers = None if judged.side.layers == whole else judged.side.layers
        return self.run(judged.plan, work, layers=layers, subject=judged, inside=True, ranks=ranks)


def sensitivity(
    walker: Walker, plan: ParitySteps, *, other: Numerics, work: Path, layers: Sequence[int]
) -> dict[int, float]:
    """Return layer -> mean KL of the next token when that layer alone computes in `other` numerics.

    One pass over the weights: each layer has a run of its own beside the base run. Memory grows with the number
    of layers by their hidden states.
    """
    runs = {layer: {"numerics": {layer: other}} for layer in layers}
    return _costs(walker, plan, work, runs)


def sensitivity_of_engine(walker: Walker, plan: ParitySteps, fed: Dump, work: Path) -> dict[int, float]:
    """Return layer -> mean KL of the next token when that layer alone is the engine's, all others PyTorch's.

    Args:
        walker: the PyTorch side.
        plan: the steps.
        fed: what the engine's layers made of PyTorch's inputs.
        work: the folder for dumps.
    """
    start, stop = fed.side.layers
    return _costs(walker, plan, work, {layer: {"enters": (layer + 1, fed)} for layer in range(start, stop)})


def _costs(walker: Walker, plan: ParitySteps, work: Path, runs: Mapping[int, dict[str, Any]]) -> dict[int, float]:
    """Run PyTorch, and beside it once for each layer with that layer changed."""
    base = walker.settings
    side = torch_side(base, "sensitivity", (0, base.config.num_hidden_layers))
    root = work / "sensitivity"
    shutil.rmtree(root, ignore_errors=True)
    streams = []
    for name, change in [("base", {}), *((f"{layer}", change) for layer, change in runs.items())]:
        (root / name).mkdir(parents=True)
        streams.append(Stream(DumpWriter(root / name, side, plan), points=(), **change))
    Reference(base, walker.source, plan, streams=streams, progress=walker.progress).run()
    for stream in streams:
        stream.writer.close()
    result = {}
    for layer in runs:
        cases = compare(Dump.open(root / str(layer)), Dump.open(root / "base")).cases
        rows = sum(len(case.kl) for case in cases)
        result[layer] = float(sum(case.kl.sum() for case in cases)) / max(1, rows)
    shutil.rmtree(root)
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
    values: dict[str, object] = numerics.model_dump() | {name: off[name] for name in names}
    return numerics_from_dict(values | {"name": f"{numerics.name} without {', '.join(names)}"})
