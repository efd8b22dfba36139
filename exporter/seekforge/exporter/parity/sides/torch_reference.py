"""The PyTorch side: layer after layer with one layer's weights in memory, over all steps of a plan.

Two things happen in one pass over the weights. Free runs (the model, and the model with its embeddings changed by
parts in a million, which shows how far two correct runs may lie apart) write dumps. And if there is an engine's dump,
every operation is also given the engine's own inputs and compared with what the engine made of them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from seekforge.common.errors import ConfigError
from seekforge.exporter.models.shared.end_operations import Head, MtpInput, Tables, TokenEmbedding
from seekforge.exporter.models.shared.layer_operations import NEXT, LayerModule, LayerState, Op
from seekforge.exporter.models.shared.moe import Moe
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.step import Step
from seekforge.exporter.parity.sides.torch_streams import Judge, Judged, Stream
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.formats.dump import Dump
from seekforge.formats.parity_steps import ParitySteps, step_inputs
from seekforge.formats.step_io import DUMPED_RESULTS, INTERMEDIATE_TENSORS, TOPK_INDICES
from seekforge.formats.weight_recipes import TensorSource

#: More than a plan has steps; PyTorch takes the lower 32 bits of a seed.
_SEEDS_PER_DRAW = 1 << 24


class Reference:
    """Walks the model layer after layer.

    Args:
        settings: the numerics and activations.
        source: the checkpoint, open.
        plan: what to run.
        streams: the free runs.
        subject: an engine's dump with taps, to be judged operation by operation.
        judge: told each operation of the subject.
        progress: told each layer.
    """

    def __init__(
        self,
        settings: Settings,
        source: TensorSource,
        plan: ParitySteps,
        *,
        streams: Sequence[Stream] = (),
        subject: Dump | None = None,
        judge: Judge | None = None,
        progress: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.settings, self.config, self.source, self.plan = settings, settings.config, source, plan
        self.streams, self.subject, self.judge, self.progress = streams, subject, judge, progress
        self._cases = {number: case for number, case, _ in plan.steps()}
        self._graphs = {number: step.graph for number, _, step in plan.steps()}
        self._arrays = {number: step_inputs(case, step) for number, case, step in plan.steps()}
        self._steps = self._make_steps()
        self._last_steps = plan.last_steps()

    @torch.inference_mode()
    def run(self, layers: tuple[int, int] | None = None) -> None:
        """Run layers [a, b) of the main model; all, and the MTP module where the plan has it, if None.

        Raises:
            ConfigError: the range starts later than 0 and the subject does not show what goes into it.
        """
        config = self.config
        start, stop = layers or (0, config.num_hidden_layers)
        whole = (start, stop) == (0, config.num_hidden_layers)
        numbers = {graph: [n for n, _, step in self.plan.steps() if step.graph == graph] for graph in ("model", "mtp")}
        if start == 0:
            self._embed(numbers["model"])
        elif self.streams:
            self._enter(numbers["model"], start)
        for layer in range(start, stop):
            self.progress(f"PyTorch layer {layer}")
            self._layer(layer, numbers["model"])
        if stop < config.num_hidden_layers:
            for stream in self.streams:
                for number in numbers["model"]:
                    values = stream.carried.pop(number)
                    if stream.beside is None:
                        stream.keep(number, {f"{name}.{stop}": value for name, value in values.items()})
        else:
            self.progress("PyTorch head")
            self._head(stop, numbers["model"])
        if whole and numbers["mtp"] and config.mtp_layer is not None:
            self.progress("PyTorch MTP module")
            self._combine(config.mtp_layer, numbers["mtp"])
            self._layer(config.mtp_layer, numbers["mtp"])
            self._head(config.mtp_layer + 1, numbers["mtp"])

    def judged_layers(self, layer: int) -> bool:
        """Whether the subject shows the inside of a layer."""
        assert self.subject is not None
        return any(f"attn_norm.{layer}" in self.subject.names(number) for number in self._arrays)

    # --- parts of a walk ------------------------------------------------------------------------------------

    def _layer(self, layer: int, numbers: Sequence[int]) -> None:
        module = LayerModule(self.settings, layer, self.source)
        self._nudge(numbers)
        for stream in self.streams:
            if not self._entered(stream, layer, numbers):
                continue
            numerics = stream.numerics.get(layer)
            if numerics is not None:
                module = LayerModule(replace(self.settings, numerics=numerics), layer, self.source)
            elif module.settings is not self.settings:
                module = LayerModule(self.settings, layer, self.source)
            for state, number in self._states(module, numbers):
                self._free(stream, module, state, number)
        if self.subject is not None and self.judge is not None and self.judged_layers(layer):
            if module.settings is not self.settings:
                module = LayerModule(self.settings, layer, self.source)
            for state, number in self._states(module, numbers):
                self._judge_layer(module, state, number)
        held = weakref.ref(module)
        del module
        if held() is not None:  # in a circle; looking for one is as long as a layer of a small model takes
            gc.collect()

    def _states(self, module: LayerModule, numbers: Iterable[int]) -> Iterator[tuple[LayerState, int]]:
        """Yield steps in order, each with the caches of its case, which are zero when a case begins."""
        state, case = None, None
        for number in numbers:
            if state is None or self._cases[number] is not case:
                case = self._cases[number]
                state = module.new_state(case.num_blocks)
            state.step = self._steps[number]
            yield state, number

    def _entered(self, stream: Stream, layer: int, numbers: Iterable[int]) -> bool:
        """Whether a stream runs this layer; if it begins here, it is given what it begins with."""
        if stream.enters is None or layer > stream.enters[0]:
            return True
        if layer == stream.enters[0]:
            for number in numbers:
                dump = stream.enters[1]
                stream.carried[number] = {
                    name: self._tensor(dump.tensor(number, f"{name}.{layer}"), name) for name in INTERMEDIATE_TENSORS
                } | self._shared_indices(dump, number, layer)
        return layer == stream.enters[0]

    def _nudge(self, numbers: Iterable[int]) -> None:
        """Give streams that run beside another what that one has now, changed a little. The MTP module is one piece."""
        for stream in self.streams:
            for number in numbers:
                if stream.beside is None or self._graphs[number] == "mtp":
                    continue
                values = enumerate(stream.beside.carried[number].items())
                stream.carried[number] = {
                    name: self._perturb(value, stream, 2 * number + i) if value.is_floating_point() else value
                    for i, (name, value) in values
                }

    def _free(self, stream: Stream, module: LayerModule, state: LayerState, number: int) -> None:
        layer = module.layer
        values, chosen = dict(stream.carried[number]), dict[str, Tensor]()

        def run(op: Op) -> None:
            values[op.output] = op.run(values)
            if stream.follows is not None and op.output in SELECTIONS:
                chosen[op.output] = values[op.output]
                values[op.output] = stream.follows(number, op, values, state, module)

        for op in module.before_cache(state):
            run(op)
        module.write_cache(state, values)
        for op in module.behind_cache(state):
            run(op)
        if "router_logits" in values:  # what decides about experts; an engine does not show it
            moe = module.module.mlp
            assert isinstance(moe, Moe)
            values["biased_scores"] = moe.gate.biased_scores(values["router_logits"])
        stream.carried[number] = {NEXT[name]: values.pop(name) for name in NEXT}
        if self.config.shares_indices(layer + 1):
            stream.carried[number][TOPK_INDICES] = values[TOPK_INDICES]
        if stream.beside is not None:
            stream.keep(number, {f"{name}.{layer + 1}": value for name, value in stream.carried[number].items()})
            return
        named = {f"{name}.{layer}": value for name, value in (values | chosen).items()}
        if number in self._last_steps and stream.points is None:
            caches = state.caches.items()
            named |= {f"cache_{kind.removesuffix('_cache')}.{layer}": cache for kind, cache in caches}
        stream.keep(number, named)

    def _judge_layer(self, module: LayerModule, state: LayerState, number: int) -> None:
        values = self._subject_values(number, module.layer)
        for op in module.before_cache(state):
            self._judge_op(module.layer, number, op, values, state, module)
        if not module.shows_cached(values):
            return
        module.write_cache(state, values)
        for op in module.behind_cache(state):
            self._judge_op(module.layer, number, op, values, state, module)

    def _judge_op(
        self,
        layer: int,
        number: int,
        op: Op,
        values: dict[str, Tensor],
        state: LayerState | None,
        module: LayerModule | None,
    ) -> None:
        """Have one operation judged, if the subject shows its inputs and its output."""
        if op.output not in values or any(name not in values for name in op.inputs if name != "residual"):
            return
        assert self.judge is not None
        inputs = {name: values[name] for name in op.inputs if name in values}
        self.judge(Judged(number, layer, op, inputs, op.run(values), values[op.output], state, module))

    def _subject_values(self, number: int, layer: int) -> dict[str, Tensor]:
        """Return what the subject shows of one layer in one step, in the activation dtype where it is one."""
        subject = self.subject
        assert subject is not None
        values: dict[str, Tensor] = {}
        for name in subject.names(number):
            point, _, tail = name.rpartition(".")
            if tail == str(layer) and not point.startswith("cache_"):
                values[point] = self._tensor(subject.tensor(number, name), point)
            elif tail == str(layer + 1) and point in INTERMEDIATE_TENSORS:
                values[f"next_{point}"] = self._tensor(subject.tensor(number, name), point)
        return values | self._shared_indices(subject, number, layer)

    def _shared_indices(self, dump: Dump, number: int, layer: int) -> dict[str, Tensor]:
        """Return the keys that an earlier layer chose for this one, if it shares them and the dump shows them."""
        if not self.config.shares_indices(layer):
            return {}
        names = (f"{TOPK_INDICES}.{layer}", f"{TOPK_INDICES}.{self.config.index_source(layer)}")
        shown = next((name for name in names if dump.has(number, name)), None)
        return {} if shown is None else {TOPK_INDICES: self._tensor(dump.tensor(number, shown), TOPK_INDICES)}

    def _tensor(self, array: np.ndarray, point: str) -> Tensor:
        tensor = torch.from_numpy(np.array(array))
        in_f32 = point in ("index_w", "router_logits", "expert_weights", "routed", "logits")
        return tensor.to(self.settings.dtype) if tensor.is_floating_point() and not in_f32 else tensor

    def _make_steps(self) -> dict[int, Step]:
        """Return what all layers of each step share; the tables that it is looked up in are forgotten."""
        tables = Tables(self.settings, self.source)
        return {
            number: tables.step(
                torch.from_numpy(arrays.positions),
                torch.from_numpy(arrays.slot_mapping),
                torch.from_numpy(arrays.block_table),
            )
            for number, arrays in self._arrays.items()
        }

    # --- the ends of the model ------------------------------------------------------------------------------

    def _embed(self, numbers: Iterable[int]) -> None:
        embedding = TokenEmbedding(self.settings, self.source)
        for number in numbers:
            embedded = embedding.run(torch.from_numpy(self._arrays[number].input_ids))
            for stream in self.streams:
                stream.carried[number] = {"hidden_states": self._perturb(embedded, stream, number)}
            if self.judge is not None:
                values = self._subject_values(number, 0)
                if "hidden_states" in values:
                    self.judge(Judged(number, 0, embedding.op, {}, embedded, values["hidden_states"], None, None))

    def _perturb(self, embedded: Tensor, stream: Stream, number: int) -> Tensor:
        if not stream.perturbation:
            return embedded
        seed = number + _SEEDS_PER_DRAW * stream.draw
        noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(seed))
        return (embedded.float() * (1 + stream.perturbation * noise)).to(embedded.dtype)

    def _enter(self, numbers: Iterable[int], layer: int) -> None:
        """Start free runs at `layer` from what the subject had there."""
        for number in numbers:
            values = self._subject_values(number, layer) if self.subject is not None else {}
            shared = (TOPK_INDICES,) if self.config.shares_indices(layer) else ()
            if any(name not in values for name in (*INTERMEDIATE_TENSORS, *shared)):
                raise ConfigError(
                    f"--layers starts at {layer}: the engine's dump does not show what goes into that layer; "
                    "use an engine of target cpu or one built with --taps"
                )
            for stream in self.streams:
                stream.carried[number] = {
                    name: self._perturb(values[name], stream, 2 * number + i)
                    for i, name in enumerate(INTERMEDIATE_TENSORS)
                } | {name: values[name] for name in shared}

    def _combine(self, layer: int, numbers: Sequence[int]) -> None:
        """Make what goes into the MTP module's layer: embedding of t_{i+1} beside the main model's hidden state."""
        combined = MtpInput(self.settings, layer, self.source)
        for number in numbers:
            ids = torch.from_numpy(self._arrays[number].input_ids)
            for stream in self.streams:
                hidden = stream.hidden[number - 1]
                if stream.beside is not None:
                    hidden = self._perturb(stream.beside.hidden[number - 1], stream, number)
                stream.carried[number] = {"hidden_states": combined.run(ids, hidden)}
            if self.judge is not None and self.subject is not None:
                values = self._subject_values(number, layer)
                if "hidden_states" in values and self.subject.has(number - 1, "hidden"):
                    hidden = self._tensor(self.subject.tensor(number - 1, "hidden"), "hidden")
                    expected = combined.run(ids, hidden)
                    self.judge(Judged(number, layer, combined.op, {}, expected, values["hidden_states"], None, None))

    def _head(self, layer: int, numbers: Sequence[int]) -> None:
        """Run final norm and LM head of the program that ends before `layer`, for free runs and for the subject."""
        head = Head(self.settings, layer - 1, self.source)
        self._nudge(numbers)
        for stream in self.streams:
            self._entered(stream, layer, numbers)
        for number in numbers:
            ops = head.operations(torch.from_numpy(self._arrays[number].logits_index))
            for stream in self.streams:
                values = dict(stream.carried.pop(number))
                named = {f"{name}.{layer}": value for name, value in values.items()}
                for op in ops:
                    values[op.output] = op.run(values)
                stream.hidden[number] = values["hidden"]
                named = named if stream.beside is None else {}
                stream.keep(number, named | {name: values[name] for name in DUMPED_RESULTS})
            if self.judge is not None and self.subject is not None:
                names = {name: name for name in DUMPED_RESULTS}
                names |= {f"{point}.{layer}": point for point in INTERMEDIATE_TENSORS}
                values = {
                    point: self._tensor(self.subject.tensor(number, name), point)
                    for name, point in names.items()
                    if self.subject.has(number, name)
                }
                for op in ops:
                    self._judge_op(layer, number, op, values, None, None)
