"""What `export` leaves out of the libraries' passes, and that no byte of any program depends on it.

    python -m tests.benchmarks.export_passes                    # every family, preset, numerics and layout: minutes
    python -m tests.benchmarks.export_passes --presets tiny,nano --numerics fp8,exact

Each graph is traced twice: as `export` does it, and with torch's decomposition and promotion of types and all rules of
onnxscript's optimizer. A row per graph: CPU seconds of both, nodes, digest. A graph that differs ends it with code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

from onnxscript import optimizer
from tests.support.weight_forms import two_layers

from seekforge.common.configs import known
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.models.sharding import fault_of
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import ONE_RANK, Parallelism

RANKS = Parallelism(tp=2, ep=True)  # of the presets that can be laid out so
trace_module = importlib.import_module("seekforge.exporter.program.trace")  # its package has a function of this name


@dataclass(frozen=True)
class Case:
    """A graph: of a model, in numerics and a layout; `layers` None: its MTP module."""

    name: str
    preset: Preset
    numerics: str
    layers: tuple[int, int] | None
    parallelism: Parallelism = ONE_RANK

    def traced(self) -> tuple[bytes, int, float]:
        """Return the graph, its nodes, and the CPU seconds that it took."""
        settings = Settings(
            self.preset.config, NUMERICS[self.numerics], activations="bf16", parallelism=self.parallelism
        )
        began = time.process_time()
        model = trace_module.trace(settings, self.layers, lambda stage: None).model
        seconds = time.process_time() - began
        return model.SerializeToString(deterministic=True), len(model.graph.node), seconds


def cases(names: list[str], numerics: list[str], most_layers: int) -> Iterator[Case]:
    """Yield the graphs of presets: whole models and MTP; of small ones a stage, ranks and weights that are kept too."""
    for name in names:
        preset = load_preset(name)
        last = preset.config.num_hidden_layers
        parts: list[tuple[int, int] | None] = [(0, min(last, most_layers))]
        parts += [None] if preset.config.mtp_layer is not None else []
        for one in numerics:
            yield from (Case(name, preset, one, layers) for layers in parts)
        if last > 10:
            continue
        for one in numerics[:1]:
            yield Case(name, preset, one, (1, 2))
            if fault_of(preset.config, RANKS) is None:
                yield from (Case(f"{name} tp2 ep", preset, one, layers, RANKS) for layers in parts)
        for dtype in ("bf16", "nvfp4") if "exact" in numerics else ():
            yield Case(f"{name} {dtype}", two_layers(name, dtype), "exact", (0, 2))


def main() -> int:
    """Compare all, print a row for each, and say whether all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default=",".join(known("models")))
    parser.add_argument("--numerics", default=",".join(NUMERICS))
    parser.add_argument("--layers", type=int, default=1000, help="of whole models only the first ones")
    chosen = parser.parse_args()
    differing = 0
    spent = [0.0, 0.0]
    for case in cases(chosen.presets.split(","), chosen.numerics.split(","), chosen.layers):
        graph, num_nodes, seconds = case.traced()
        with (
            mock.patch.object(trace_module, "lower", lambda program: program),
            mock.patch.object(trace_module, "_optimize", optimizer.optimize),
        ):
            expected, _, whole_seconds = case.traced()
        spent = [spent[0] + seconds, spent[1] + whole_seconds]
        layers = "MTP" if case.layers is None else f"layers {case.layers[0]}-{case.layers[1] - 1}"
        verdict = hashlib.sha256(graph).hexdigest()[:16] if graph == expected else "DIFFERS"
        differing += graph != expected
        sys.stdout.write(
            f"{case.name}, {case.numerics}, {layers}: {num_nodes} nodes, {seconds:.1f} s, "
            f"with all passes {whole_seconds:.1f} s: {verdict}\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{spent[0]:.0f} s, with all passes {spent[1]:.0f} s; {differing} differ\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
