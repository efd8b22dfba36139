"""What a walk of PyTorch makes: free runs, which write dumps, and operations to be judged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from seekforge.exporter.models.shared.layer_operations import LayerModule, LayerState, Op
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.formats.dump import Dump, DumpWriter
from seekforge.formats.numerics import Numerics
from seekforge.formats.step_io import INTERMEDIATE_TENSORS

#: What a free run keeps of each layer when it is only there to measure noise.
NOISE_POINTS = (*INTERMEDIATE_TENSORS, *SELECTIONS, "index_q", "index_w", "index_k", "biased_scores")

#: Told each operation of the side that is judged.
Judge = Callable[["Judged"], None]
#: Told the step, the operation that chooses, all values of the run with its own choice, the caches and the layer;
#: returns the choice to go on with.
Follow = Callable[[int, Op, Mapping[str, Tensor], LayerState, LayerModule], Tensor]


@dataclass(frozen=True)
class Judged:
    """One operation of one step: what PyTorch makes of the engine's inputs, and what the engine made of them.

    Attributes:
        step: the number of the step over all cases.
        layer: the absolute number of the layer.
        op: the operation.
        inputs: the engine's values by name, as `op` takes them.
        expected: PyTorch's result.
        actual: the engine's result, of the same shape.
        state: what PyTorch has cached for the layer; None outside layers.
        module: PyTorch's layer; None outside layers.
    """

    step: int
    layer: int
    op: Op
    inputs: dict[str, Tensor]
    expected: Tensor
    actual: Tensor
    state: LayerState | None
    module: LayerModule | None


@dataclass
class Stream:
    """A free run.

    Attributes:
        writer: writes its dump.
        perturbation: relative change of the embeddings.
        draw: which of the random changes is made.
        points: the points to keep; None keeps all.
        layers: the layers of which points are kept; None: all.
        numerics: layer -> other numerics there, to see what one layer costs.
        beside: a run whose inputs each layer takes, changed by `perturbation`: what one layer makes of noise, while
            noise from the embeddings on grows from layer to layer. It keeps what comes out of each layer.
        enters: (layer, dump): the run begins there, with what that dump has there.
        follows: says with which keys and experts the run goes on. It keeps its own choices.
        carried: step -> what goes into the next layer, by point.
        hidden: step -> the normed hidden state behind the last layer.
    """

    writer: DumpWriter
    perturbation: float = 0.0
    draw: int = 0
    points: Sequence[str] | None = None
    numerics: Mapping[int, Numerics] = field(default_factory=dict)
    layers: Collection[int] | None = None
    beside: Stream | None = None
    enters: tuple[int, Dump] | None = None
    follows: Follow | None = None
    carried: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, step: int, values: dict[str, Tensor]) -> None:
        """Write the values that this run keeps."""
        kept = {
            name: value.float().numpy() if value.is_floating_point() else value.numpy()
            for name, value in values.items()
            if self._keeps(name)
        }
        self.writer.write(step, kept)

    def _keeps(self, name: str) -> bool:
        point, _, layer = name.rpartition(".")
        if not point:
            return True  # hidden, logits
        return (self.points is None or point in self.points) and (self.layers is None or int(layer) in self.layers)
