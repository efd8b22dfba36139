"""The loop of a training: batches to updates; a state on disk, from which it goes on to the same weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from seekforge.common.errors import OutputError
from seekforge.common.files import explain_os_error, replace_file
from seekforge.common.reading import check_regular
from seekforge.exporter.training.batches import Batch
from seekforge.exporter.training.losses import losses
from seekforge.exporter.training.model import Moe, TrainedModel
from seekforge.exporter.training.optimizer import Optimizer
from seekforge.exporter.training.schedule import Schedule
from seekforge.exporter.training.weights import round_weights

#: Steps between two states on disk.
SAVE_STEPS: Final = 100
#: Of the positions of a row, one of so many trains the indexer in a step.
_INDEX_SHARE: Final = 8


class Data(Protocol):
    """What gives the batches of a step, and the weight of the loss of each."""

    def batches(self, schedule: Schedule, step: int) -> Sequence[tuple[Batch, float]]:
        """Return them; the same ones whenever they are asked for."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        step: updates so far.
        num_tokens: tokens seen so far.
        next_token, mtp, indexer: the losses of the first pass of the step; 0 where one was not part of it.
    """

    step: int
    num_tokens: int
    next_token: float
    mtp: float
    indexer: float


class Training:
    """A model, its optimizer, and how far they are.

    Args:
        model: the model; updated in place.
        data: gives batches.
        schedule: what happens when.
        key: what identifies this training; a state of another key is refused.
    """

    def __init__(self, model: TrainedModel, data: Data, schedule: Schedule, key: dict[str, Any]) -> None:
        self.model, self.data, self.schedule = model, data, schedule
        self.key = {"schedule": asdict(schedule), **key}
        self.optimizer = self._new_optimizer()
        self.step = self.num_tokens = 0
        layers = [*model.layers, *([model.mtp.layer] if model.mtp is not None else [])]
        self._moes = [layer.mlp for layer in layers if isinstance(layer.mlp, Moe)]

    def run(self, state: Path | None = None, report: Callable[[Progress], object] | None = None) -> None:
        """Take all steps that are left.

        Args:
            state: where the state is kept while it runs; None: nowhere.
            report: told of each step.
        """
        while self.step < self.schedule.steps:
            progress = self.update()
            if report is not None:
                report(progress)
            if state is not None and self.step % SAVE_STEPS == 0 and self.step < self.schedule.steps:
                self.save(state)

    def _new_optimizer(self) -> Optimizer:
        one = self.schedule
        return Optimizer(self.model, one.matrix_rate, one.other_rate, one.weight_decay, one.slow_rate)

    def update(self) -> Progress:
        """Take one step.

        A round of the last stage begins as if the checkpoint of the steps before it were trained on: with the weights
        as it holds them and a new optimizer, so that a round can be tried on a checkpoint alone.
        """
        schedule, step = self.schedule, self.step
        if schedule.begins_round(step):
            round_weights(self.model)
            self.optimizer = self._new_optimizer()
        first: Any = None
        for batch, weight in self.data.batches(schedule, step):
            length = batch.ids.shape[1]
            chosen = torch.randperm(length, generator=torch.Generator().manual_seed(step))
            rows = chosen[: max(1, length // _INDEX_SHARE)].sort().values
            one = losses(
                self.model,
                batch,
                sparse=schedule.is_sparse(step),
                mtp_weight=schedule.mtp_weight_of(step),
                rows=rows,
            )
            (one.total * weight).backward()
            for moe, load in zip(self._moes, one.context.loads):
                mean = load.float().mean()
                moe.e_score_correction_bias.add_(torch.sign(mean - load), alpha=schedule.bias_rate)
            self.num_tokens += batch.ids.numel()
            first = first or one
        for parameter in self.model.parameters():
            if schedule.holds(step) and id(parameter) in self.optimizer.planted:
                parameter.grad = None
            elif parameter.grad is None:  # such as those of the MTP module, in a step without its loss
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step(schedule.factor(step))
        self.step += 1
        return Progress(self.step, self.num_tokens, first.next_token, first.mtp, first.indexer)

    def save(self, path: Path) -> None:
        """Write the state; what stood there is replaced whole.

        Raises:
            OutputError: it cannot be written.
        """
        state = {
            "key": self.key,
            "step": self.step,
            "num_tokens": self.num_tokens,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
        }
        packed = io.BytesIO()  # torch's writer ends in a RuntimeError of its own where a file cannot grow
        torch.save(state, packed)
        try:
            replace_file(path, packed.getvalue())
        except OSError as error:
            raise explain_os_error(error, path) from None

    def load(self, path: Path) -> None:
        """Go on from a state; no code in it is run.

        Raises:
            OutputError: it is damaged, or of another training.
        """
        remedy = "delete it to begin anew"
        try:
            check_regular(path)
            state = torch.load(path, weights_only=True)
            key = state["key"]
        except Exception:  # torch's reader of a damaged file ends in any of a dozen
            raise OutputError(f"{path}: is no state of a training; {remedy}") from None
        if key != self.key:
            raise OutputError(f"{path}: is the state of a training with other settings; repeat those, or {remedy}")
        try:
            self.step, self.num_tokens = int(state["step"]), int(state["num_tokens"])
            if not 0 <= self.step <= self.schedule.steps:
                raise ValueError(f"step {self.step} of {self.schedule.steps}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load(state["optimizer"])
        except Exception:  # whatever a value is in place of a number, a tensor or a mapping
            raise OutputError(f"{path}: is damaged; {remedy}") from None
