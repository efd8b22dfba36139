"""Every operation judged by its own inputs: what `Reference` hands over, gathered into one record per operation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from seekforge.exporter.models.shared.layer_operations import Part
from seekforge.exporter.models.shared.moe import Moe
from seekforge.exporter.parity.compare.metrics import (
    Flip,
    classify,
    different,
    expert_gaps,
    farthest,
    key_gaps,
    row_errors,
)
from seekforge.exporter.parity.compare.rank_errors import other_choices, rank_errors
from seekforge.exporter.parity.sides.rank_dump import RankDump
from seekforge.exporter.parity.sides.torch_streams import Judged
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.formats.dump import Dump
from seekforge.formats.numerics import Numerics
from seekforge.formats.paged_cache import BLOCK_SIZE

#: Largest error of an operation that was given the same inputs, in parts of the root mean square of its output.
#: Measured between ONNX Runtime and torch in f32 on the tiny model: up to 7e-6, in attention (a softmax) 1.5e-5.
GATE_F32, GATE_ATTENTION = 5e-5, 1e-4
#: In bf16 both sides round what they give: half a unit in the last place is 2^-9, and the largest value of a row is
#: some four times its root mean square.
GATE_BF16 = 2e-2
#: Products of an engine whose weights are codes in blocks of 32, and whose inputs are rounded to int8: what is asked is
#: not whether they are equal but whether the codes are right. On the tiny model 0.07 and 0.76 were measured; a wrong
#: scale or a misplaced code gives 4, as two vectors that have nothing to do with each other.
GATE_CODES = {"int8": 0.15, "int4": 1.5}
#: The routed experts quantize inside the operation, where no tap reaches: single e4m3 roundings may flip there.
FLIPPED_ROWS, GATE_FLIPPED = 0.2, 0.1
#: Score gaps that a sum in another order explains, in parts of a row's spread of scores; of experts absolute.
NOISE_KEYS, NOISE_EXPERTS = 1e-5, 2e-6
_KEEP_FLIPS = 200


@dataclass
class OpRecord:
    """One operation of one layer over all steps.

    Attributes:
        order: place in the order of data.
        layer: absolute number; the number behind the last layer for final norm and head.
        graph: model or mtp.
        module: the checkpoint's module that computes it.
        does: what it computes, in words.
        tensors: the checkpoint tensors that it reads.
        gate: the largest error that is allowed.
        reason: why the gate is what it is.
        error: the largest row error.
        num_rows: how many rows were compared.
        num_bad: how many of them lie beyond the gate.
        where: case, step, sequence and position of the worst row.
        flips: keys or experts chosen on one side only, with gaps: the farthest, farthest first.
        num_flips: kind of flip -> how many there were.
        num_choices: how many choices were compared.
        ranks: ranks that gave something else -> their largest row error; empty of an engine of one rank.
        failed: whether the operation is at fault.
        detail: what is known beyond that, in words.
    """

    order: int
    layer: int
    graph: str
    module: str
    does: str
    tensors: tuple[str, ...]
    gate: float
    reason: str
    error: float = 0.0
    num_rows: int = 0
    num_bad: int = 0
    where: dict[str, object] = field(default_factory=dict)
    flips: list[Flip] = field(default_factory=list)
    num_flips: dict[str, int] = field(default_factory=lambda: {"tie": 0, "noise": 0, "wrong": 0})
    num_choices: int = 0
    ranks: dict[int, float] = field(default_factory=dict)
    failed: bool = False
    detail: str = ""


class LocalJudge:
    """Collects records; pass `judge` to `Reference`.

    Args:
        subject: the dump that is judged.
        numerics: the roundings that both sides make.
        activations: the dtype that they compute in, f32 or bf16.
        ranks: what single ranks of the engine had; None: it has one.
    """

    def __init__(self, subject: Dump, numerics: Numerics, activations: str, ranks: RankDump | None = None) -> None:
        self.subject, self.numerics, self.activations, self.ranks = subject, numerics, activations, ranks
        self.records: dict[tuple[str, int, str], OpRecord] = {}
        self._experts: dict[tuple[str, int], _Experts] = {}
        self._last_steps = subject.plan.last_steps()

    def __call__(self, judged: Judged) -> None:
        """Take one operation of one step."""
        if judged.op.output in SELECTIONS:
            self._selection(judged)
            return
        real = torch.from_numpy(self.subject.arrays(judged.step).real)
        expected, actual = _rows(judged.expected, real), _rows(judged.actual, real)
        parts = judged.op.parts or (Part(0, expected.shape[1], judged.op.module, judged.op.tensors),)
        for part in parts:
            self._numbers(judged, part, expected[:, part.start : part.stop], actual[:, part.start : part.stop])
            if self.ranks is not None:
                self._name_ranks(self.ranks, judged, part, expected, actual, real)
        if judged.op.output == "o_latent" and judged.step in self._last_steps:
            self._caches(judged)

    def finish(self) -> list[OpRecord]:
        """Return the records in the order of data, each with its verdict."""
        for (graph, layer), experts in self._experts.items():
            experts.conclude(self.records[graph, layer, experts.module])
        concluded = {(graph, layer, experts.module) for (graph, layer), experts in self._experts.items()}
        for record in self.records.values():
            record.flips = farthest(record.flips, _KEEP_FLIPS)
            if (record.graph, record.layer, record.module) in concluded and self.numerics.act_quant != "none":
                continue
            if record.num_choices:
                record.failed = record.num_flips["wrong"] > 0
            else:
                record.failed = record.failed or not record.error <= record.gate
        return sorted(self.records.values(), key=lambda record: record.order)

    def _record(self, judged: Judged, module: str, tensors: tuple[str, ...], gate: float, reason: str) -> OpRecord:
        graph = self.subject.cases[judged.step][1].graph
        key = (graph, judged.layer, module)
        if key not in self.records:
            order = len(self.records)
            self.records[key] = OpRecord(order, judged.layer, graph, module, judged.op.does, tensors, gate, reason)
        return self.records[key]

    def _numbers(self, judged: Judged, part: Part, expected: np.ndarray, actual: np.ndarray) -> None:
        if self.activations == "bf16":
            gate, reason = GATE_BF16, "each given the engine's own inputs; both sides round their results to bf16"
        elif judged.op.output == "o_latent":
            gate, reason = (
                GATE_ATTENTION,
                "each given the engine's own inputs; f32 sums and a softmax in another order (1.5e-5 measured)",
            )
        else:
            gate, reason = GATE_F32, "each given the engine's own inputs; f32 sums in another order (7e-6 measured)"
        how = self.subject.side.quantization
        stored = "f32" if how is None else how.stored_in(judged.layer, judged.op.module.rpartition(".")[2])
        if stored in GATE_CODES:
            gate, reason = GATE_CODES[stored], f"weights are {stored} codes: the price, unless codes are wrong"
        record = self._record(judged, part.module, part.tensors, gate, reason)
        if len(expected) == 0:
            return
        errors = row_errors(actual, expected)
        record.num_rows += len(errors)
        record.num_bad += int((errors > gate).sum())
        worst = int(errors.argmax())
        if errors[worst] > record.error:
            record.error = float(errors[worst])
            arrays = self.subject.arrays(judged.step)
            if judged.op.output == "logits":  # a row of the flattened [B, Q] -> its place among the real ones
                worst = int(arrays.real[: arrays.logits_index[worst]].sum())
            record.where = self._where(judged.step, worst)
        if judged.op.output == "routed":
            graph = self.subject.cases[judged.step][1].graph
            ids = _rows(judged.inputs["expert_ids"], torch.from_numpy(self.subject.arrays(judged.step).real))
            rounded = self.numerics.act_quant != "none"
            experts = self._experts.setdefault((graph, judged.layer), _Experts(judged.op.module, rounded))
            experts.add(ids, errors)

    def _name_ranks(
        self, ranks: RankDump, judged: Judged, part: Part, expected: np.ndarray, actual: np.ndarray, real: Tensor
    ) -> None:
        """Note which ranks gave something else; one that has alone what all should have alike is found here."""
        record = self.records[self.subject.cases[judged.step][1].graph, judged.layer, part.module]
        columns = slice(part.start, part.stop)
        errors = rank_errors(
            ranks,
            judged,
            expected[:, columns],
            actual[:, columns],
            record.gate,
            lambda array: _rows(torch.from_numpy(array), real)[:, columns],
        )
        for rank, error in errors.items():
            record.ranks[rank] = max(error, record.ranks.get(rank, 0.0))
            if not error <= record.gate:
                record.error = max(record.error, error)

    def _where(self, step: int, row: int) -> dict[str, object]:
        case, plan_step = self.subject.cases[step]
        sequence, position = plan_step.places()[row]
        return {"case": case.name, "step": step, "sequence": sequence, "position": position}

    # --- selections -----------------------------------------------------------------------------------------

    def _selection(self, judged: Judged) -> None:
        keys = judged.op.output == "topk_indices"
        reason = (
            f"same queries and cached keys: scores agree to {NOISE_KEYS:g} of their spread"
            if keys
            else f"same router logits: biased scores agree to {NOISE_EXPERTS:g}"
        )
        record = self._record(judged, judged.op.module, judged.op.tensors, 0.0, reason)
        real = torch.from_numpy(self.subject.arrays(judged.step).real)
        expected, actual = _rows(judged.expected, real), _rows(judged.actual, real)
        record.num_rows += len(expected)
        record.num_choices += int((expected >= 0).sum())
        if self.ranks is not None:
            for rank in other_choices(self.ranks, judged.step, f"{judged.op.output}.{judged.layer}"):
                record.ranks[rank] = np.inf
                record.num_flips["wrong"] += 1
                record.detail = "ranks of a stage chose otherwise from each other"
        rows = np.flatnonzero((np.sort(expected, -1) != np.sort(actual, -1)).any(-1))
        if len(rows) == 0:
            return
        record.num_bad += len(rows)
        scores = self._key_scores(judged, real) if keys else self._expert_scores(judged, real)
        places = self.subject.cases[judged.step][1].places()
        for row in rows:
            by_judged, by_reference = different(actual[row], expected[row])
            changed = np.concatenate([by_judged, by_reference])
            if keys:
                visible = scores[row][np.isfinite(scores[row])]
                gaps = key_gaps(visible, expected[row], changed)
            else:
                config = judged.module.config  # pyright: ignore[reportOptionalMemberAccess]
                gaps = expert_gaps(scores[row], expected[row], changed, config.n_group, config.topk_group)
            sequence, position = places[row]
            for i, (choice, gap) in enumerate(zip(changed.tolist(), gaps.tolist(), strict=True)):
                kind = classify(gap, NOISE_KEYS if keys else NOISE_EXPERTS)
                record.num_flips[kind] += 1
                record.error = max(record.error, gap)
                by = "judged" if i < len(by_judged) else "reference"
                record.flips.append(Flip(judged.step, sequence, position, choice, by, gap, kind))
                if not record.where and kind == "wrong":
                    record.where = self._where(judged.step, int(row))
            if len(record.flips) > 2 * _KEEP_FLIPS:
                record.flips = farthest(record.flips, _KEEP_FLIPS)

    def _key_scores(self, judged: Judged, real: Tensor) -> np.ndarray:
        state, module = judged.state, judged.module
        assert state is not None and module is not None
        return _rows(module.key_scores(state, judged.inputs), real)

    def _expert_scores(self, judged: Judged, real: Tensor) -> np.ndarray:
        module = judged.module
        assert module is not None
        moe = module.module.mlp
        assert isinstance(moe, Moe)
        return _rows(moe.gate.biased_scores(judged.inputs["router_logits"]), real)

    # --- caches ---------------------------------------------------------------------------------------------

    def _caches(self, judged: Judged) -> None:
        """Compare what is cached after the last step with what the engine's own steps wrote there."""
        assert judged.state is not None
        case, _ = self.subject.cases[judged.step]
        reason = "what is cached must be what was written, once rounded as the numerics ask"
        attention = judged.op.module.partition(" ")[0]
        for cache_name, expected in judged.state.caches.items():
            kind = cache_name.removesuffix("_cache")
            name = f"cache_{kind}.{judged.layer}"
            if not self.subject.has(judged.step, name):
                continue
            record = self._record(judged, f"{attention} ({kind} cache)", (), GATE_F32, reason)
            cache = self.subject.tensor(judged.step, name)
            if cache.shape != tuple(expected.shape):
                record.detail = f"layout {cache.shape} is not compared with {tuple(expected.shape)}"
                continue
            wanted = expected.float().numpy()[BLOCK_SIZE:]  # block 0 is scrap
            rms = float(np.sqrt((wanted.astype(np.float64) ** 2).mean())) or 1.0
            errors = row_errors(np.asarray(cache)[BLOCK_SIZE:], wanted, rms)
            # one element of e4m3 may flip where the two sides quantize different bits of the same number
            quantized = self.numerics.kv_fp8 if kind == "latent" else self.numerics.indexer_fp8
            bad = np.flatnonzero(~(errors <= (0.5 if quantized else record.gate)))
            record.num_rows += len(errors)
            record.num_bad += len(bad)
            record.error = max(record.error, float(errors.max()))
            if quantized:
                record.gate, record.reason = 0.5, reason + "; a value may round to the neighboring e4m3 number"
            if len(bad) and not record.detail:
                record.failed = True
                record.detail = _where_in_cache(bad + BLOCK_SIZE, case.tables, BLOCK_SIZE)
                owner = _owner((bad[0] + BLOCK_SIZE) // BLOCK_SIZE, case.tables)
                if owner is not None:
                    position = owner[1] * BLOCK_SIZE + int(bad[0] % BLOCK_SIZE)
                    record.where = {
                        "case": case.name,
                        "step": judged.step,
                        "sequence": owner[0],
                        "position": position,
                    }


class _Experts:
    """Finds out which expert is wrong: the one whose every token is."""

    def __init__(self, module: str, quantized: bool) -> None:
        self.module, self.quantized = module, quantized
        self._ids: list[np.ndarray] = []
        self._errors: list[np.ndarray] = []

    def add(self, ids: np.ndarray, errors: np.ndarray) -> None:
        self._ids.append(ids)
        self._errors.append(errors)

    def conclude(self, record: OpRecord) -> None:
        ids, errors = np.concatenate(self._ids), np.concatenate(self._errors)
        bad = errors > record.gate
        suspects: list[int] = []
        left = bad.copy()
        # greedily: the expert that explains most bad rows and whose own rows are mostly bad
        for expert in sorted(set(ids.ravel().tolist()), key=lambda e: -int(bad[(ids == e).any(-1)].sum())):
            chose_it = (ids == expert).any(-1)
            if chose_it.sum() and bad[chose_it].mean() >= 0.8 and left[chose_it].any():
                suspects.append(int(expert))
                left &= ~chose_it
        if self.quantized:
            record.reason = (
                "each given the engine's own inputs; single e4m3 roundings inside the experts may flip: no expert may "
                f"be off on most of its tokens, at most {FLIPPED_ROWS:.0%} of the rows, by at most {GATE_FLIPPED:g}"
            )
            record.failed = bool(suspects) or bad.mean() > FLIPPED_ROWS or not record.error <= GATE_FLIPPED
        if suspects and (self.quantized or bad.any()):
            count = len(suspects)
            record.detail = f"expert{'s' if count > 1 else ''} {', '.join(map(str, suspects[:8]))}: " + (
                f"{int(bad.sum())} of {len(bad)} rows are off, and all that chose "
                f"{'them' if count > 1 else 'it'} are among them"
            )
            named = tuple(
                name for name in record.tensors if any(f".experts.{expert}." in name for expert in suspects[:8])
            )
            record.tensors = named or record.tensors


def _rows(tensor: Tensor, real: Tensor) -> np.ndarray:
    """Return [real rows, width] of [B, Q, ...] or [B·Q, ...]; of logits, whose rows are those wanted, all."""
    flat = tensor if tensor.dim() == 2 else tensor.flatten(0, 1)
    if len(flat) == len(real):
        flat = flat[real]
    flat = flat.flatten(1)
    return flat.float().numpy() if flat.is_floating_point() else flat.numpy()


def _owner(block: int, tables: tuple[tuple[int, ...], ...]) -> tuple[int, int] | None:
    """Return (sequence, place in its table) of a block."""
    for sequence, table in enumerate(tables):
        if block in table:
            return sequence, table.index(block)
    return None


def _where_in_cache(slots: np.ndarray, tables: tuple[tuple[int, ...], ...], block_size: int) -> str:
    """Say which positions of which sequence lie in these slots."""
    parts = []
    for block in sorted({int(slot) // block_size for slot in slots})[:8]:
        inside = np.array([slot % block_size for slot in slots if slot // block_size == block])
        owner = _owner(block, tables)
        if owner is None:
            parts.append(f"block {block}, which nobody owns, was written to")
            continue
        first, last = owner[1] * block_size + int(inside.min()), owner[1] * block_size + int(inside.max())
        parts.append(f"block {block}: positions {first}-{last} of sequence {owner[0]} ({len(inside)} tokens)")
    return "; ".join(parts)
