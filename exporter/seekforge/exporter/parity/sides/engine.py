"""The engine's side of a check: its dumps, each made by the runtime in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from seekforge.common.cli.terminal import typed
from seekforge.common.paths import real_path
from seekforge.common.system import child_environment
from seekforge.exporter.parity.engine_copy import available_taps, tapped_copy
from seekforge.exporter.parity.sides.rank_dump import RankDump
from seekforge.exporter.parity.sides.split_engine import cut_copy
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.exporter.runtime_child import refusal
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import Dump
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.engine.ranks import Ranks, bare_name
from seekforge.formats.engine.verify import listed_files
from seekforge.formats.parity_steps import ParitySteps


class EngineSide:
    """Makes dumps of one engine.

    Args:
        folder: the engine's folder.
        work: a folder for changed copies.
        threads: CPU threads for one operator.
        checkpoint: where the weights are, of an engine that holds none; None takes where they were at build.
    """

    def __init__(self, folder: Path, work: Path, threads: int | None = None, checkpoint: Path | None = None) -> None:
        self.folder, self.work, self.threads, self.checkpoint = folder, work, threads, checkpoint
        self.manifest = load_manifest(folder)
        listed_files(folder, self.manifest)
        self.taps = available_taps(folder)
        #: Whether its graph can be opened and cut between layers.
        self.opens = self.manifest.target.backend == "onnxruntime" and self.manifest.ranks is None
        self.num_runs = 0
        #: What single ranks showed in the last dump; None of an engine of one rank, or without taps.
        self.ranks: RankDump | None = None

    @property
    def layers(self) -> tuple[int, int] | None:
        """Return the layers [a, b) of an engine that is a stage; None of a whole model."""
        layers = self.manifest.layer_range
        return None if layers == (0, int(self.manifest.config["num_hidden_layers"])) else layers

    @property
    def has_codes(self) -> bool:
        """Whether its weights are int8 or int4 codes."""
        return self.manifest.quantization is not None

    def dump(
        self,
        plan: ParitySteps,
        out: Path,
        taps: Collection[str],
        *,
        selections: bool = True,
        inputs: Dump | None = None,
    ) -> Dump:
        """Run a plan and keep `taps` beside results, caches and, if `selections`, what was chosen.

        Args:
            plan: the steps.
            out: the folder to make.
            taps: the names of taps.
            selections: whether to keep which keys and experts were chosen.
            inputs: another side's dump, of what goes into a stage.

        Raises:
            EngineError: the runtime refused, with its own words.
        """
        if self.manifest.ranks is not None and taps:
            return self._dump_ranks(self.manifest.ranks, plan, out, taps, selections)
        outputs = {spec.name for graph_io in self.manifest.graphs.values() for spec in graph_io.outputs}
        kept = [*taps, *(name for name in outputs if selections and name.startswith(_SELECTIONS))]
        if set(taps) <= outputs:
            return self._run(self.folder, plan, out, kept, inputs)
        copy = self._copy()
        try:
            return self._run(tapped_copy(self.folder, copy, taps), plan, out, kept, inputs)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _dump_ranks(self, ranks: Ranks, plan: ParitySteps, out: Path, taps: Collection[str], selections: bool) -> Dump:
        """Run a plan on a copy whose ranks show what each has, and put that together."""
        copy, shown = self._copy(), out.with_name(f"{out.name}-ranks")
        shutil.rmtree(shown, ignore_errors=True)
        try:
            tapped_copy(self.folder, copy, taps)
            graphs = load_manifest(copy).graphs.values()
            names = [spec.name for graph_io in graphs for spec in graph_io.outputs if spec.role in ("tap", "debug")]
            kept = [name for name in names if selections or not bare_name(name).startswith(_SELECTIONS)]
            dump = self._run(copy, plan, shown, kept)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        self.ranks = RankDump(dump, ranks, ModelConfig.parse(self.manifest.config, str(self.folder)))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return self.ranks.write_whole(out)

    def dump_fed(self, inputs: Dump, out: Path, layers: tuple[int, int], taps: Collection[str] = ()) -> Dump:
        """Run layers [a, b), each on what `inputs` had before it; what comes out of each is kept, and `taps`.

        Raises:
            EngineError: the engine is compiled, or the runtime refused.
        """
        copy = self._copy()
        try:
            return self._run(cut_copy(self.folder, copy, layers, taps), inputs.plan, out, None, inputs)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _copy(self) -> Path:
        return self.work / f"copy-{self.num_runs}"

    def _run(
        self, engine: Path, plan: ParitySteps, out: Path, taps: Sequence[str] | None, inputs: Dump | None = None
    ) -> Dump:
        self.num_runs += 1
        plan_file = self.work / "plan.json"
        plan_file.write_text(plan.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "seekforge.runtime.cli.dump", typed(engine), typed(out), "--quiet", "--force"]
        command += ["--plan", typed(plan_file), "--name", real_path(self.folder).name]
        if taps is not None:
            command += ["--taps", ",".join(taps)]
        if inputs is not None:
            command += ["--inputs", typed(inputs.folder)]
        if self.checkpoint is not None and self.manifest.weights is not None:
            command += ["--checkpoint", typed(self.checkpoint)]
        if self.threads:
            command += ["--threads", str(self.threads)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=child_environment())
        if done.returncode != 0:
            raise refusal(engine, str(self.folder), done.stderr, done.returncode)
        return Dump.open(out)


_SELECTIONS = tuple(f"{name}." for name in SELECTIONS)
