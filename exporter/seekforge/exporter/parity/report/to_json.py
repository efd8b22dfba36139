"""A finished check as plain JSON values; the terminal's tables (`terminal`) and the page (`page`) are made of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from seekforge.exporter.parity.check import Result
from seekforge.exporter.parity.compare.dumps import CaseComparison, LayerComparison
from seekforge.exporter.parity.compare.metrics import Difference, Flip
from seekforge.exporter.parity.compare.operations import OpRecord
from seekforge.exporter.parity.compare.selections import Choices

REPORT_FORMAT = 1
#: Columns of a heat map and points of a curve over positions: longer texts are binned by their largest value.
_BINS = 200


def to_json(result: Result) -> dict[str, Any]:
    """Return the report as JSON values; numbers that are not finite become strings."""
    comparison = result.comparison
    report = {
        "format": REPORT_FORMAT,
        "passed": result.passed,
        "judged": _side(result.judged),
        "reference": _side(result.reference),
        "model": {
            key: result.reference.config[key]
            for key in ("num_hidden_layers", "hidden_size", "index_topk", "n_routed_experts", "num_experts_per_tok")
        },
        "num_engine_runs": result.num_engine_runs,
        "notes": result.notes,
        "gates": [dataclasses.asdict(gate) for gate in result.gates],
        "finding": None if result.finding is None else dataclasses.asdict(result.finding),
        "cases": [_case(case) for case in comparison.cases],
        "layers": [_layer(layer, result) for layer in comparison.layers],
        "operations": [_operation(record) for record in result.records],
        "layers_on_reference_inputs": [dataclasses.asdict(one) for one in result.fed],
        "sensitivity": [{"layer": layer, "kl": value} for layer, value in result.sensitivity.items()],
    }
    return _finite(report)


def _side(side: Any) -> dict[str, Any]:
    return {
        "kind": side.kind,
        "name": side.name,
        "numerics": side.numerics.get("name", "?"),
        "activations": side.activations,
        "layers": list(side.layers),
        "versions": side.versions,
    }


def _difference(value: Difference | None) -> dict[str, float] | None:
    if value is None:
        return None
    return {
        "max_abs": value.max_abs,
        "max_relative": value.max_relative,
        "rms_relative": value.rms_relative,
        "cosine_difference": value.cosine_difference,
        "calc_diff": value.calc_diff,
    }


def _flips(flips: list[Flip]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(flip) for flip in flips]


def _choices(choices: Choices | None) -> dict[str, Any] | None:
    if choices is None:
        return None
    return {
        "rows": choices.rows,
        "rows_other": choices.other,
        "overlap": choices.overlap / choices.rows if choices.rows else 1.0,
        "tolerance": choices.tolerance,
        "kinds": choices.kinds,
        "noise_rows": choices.noise_rows,
        "flips": _flips(choices.flips),
        "curve": _curve(choices),
    }


def _curve(choices: Choices) -> list[dict[str, float]]:
    contexts = sorted(choices.curve)
    result = []
    for part in np.array_split(np.array(contexts), max(1, min(len(contexts), 60))):
        if len(part):
            total = sum(choices.curve[int(c)][0] for c in part)
            count = sum(choices.curve[int(c)][1] for c in part)
            result.append({"context": int(part[-1]), "overlap": total / count, "rows": count})
    return result


def _layer(layer: LayerComparison, result: Result) -> dict[str, Any]:
    fed = next((one.error for one in result.fed if (one.layer, one.graph) == (layer.layer, layer.graph)), None)
    records = [r for r in result.records if r.layer == layer.layer and r.graph == layer.graph and not r.num_choices]
    records = [r for r in records if not r.module.endswith("cache)")]
    worst = max(records, key=lambda r: r.error, default=None)
    return {
        "layer": layer.layer,
        "graph": layer.graph,
        "points": {point: _difference(value) for point, value in layer.points.items()},
        "caches": {kind: _difference(value) for kind, value in layer.caches.items()},
        "stream": _difference(layer.stream),
        "noise": _difference(layer.noise),
        "worst_operation": None if worst is None else {"module": worst.module, "error": worst.error},
        "keys": _choices(layer.keys),
        "experts": _choices(layer.experts),
        "on_reference_inputs": fed,
    }


def _operation(record: OpRecord) -> dict[str, Any]:
    raw = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "flips"}
    return raw | {
        "tensors": list(record.tensors[:12]),
        "num_tensors": len(record.tensors),
        "flips": _flips(record.flips),
    }


def _case(case: CaseComparison) -> dict[str, Any]:
    known = np.isfinite(case.nll) & np.isfinite(case.nll_reference)
    perplexity = {}
    if known.any():
        judged, reference = (float(np.exp(nll[known].mean())) for nll in (case.nll, case.nll_reference))
        perplexity = {
            "perplexity": judged,
            "perplexity_reference": reference,
            "perplexity_difference": judged - reference,
        }
    numbers = {}
    if len(case.error):
        numbers = {
            "error_median": float(np.median(case.error)),
            "error_max": float(case.error.max()),
            "logits": _difference(case.logits),
            "kl_mean": float(case.kl.mean()),
            "kl_max": float(case.kl.max()),
            "top1": float(case.top1.mean()),
            "top10": float(case.top10.mean()),
        }
    bins = np.array_split(np.arange(len(case.rows)), min(_BINS, len(case.rows)))
    where = [case.rows[int(part[0])] for part in bins]
    columns = np.array([case.heat[:, part].max(-1) for part in bins]).T if case.heat.size else np.zeros((0, len(bins)))
    at = np.full(len(case.rows), np.nan)
    at[case.logit_rows] = case.error
    noise = np.full(len(case.rows), np.nan)
    if len(case.noise_error):
        noise[case.logit_rows] = case.noise_error

    def binned(values: np.ndarray) -> list[float | None]:
        return [float(np.nanmax(values[p])) if not np.isnan(values[p]).all() else None for p in bins]

    return {
        "name": case.name,
        "mode": case.mode,
        "context": case.context,
        "graph": case.graph,
        "rows": len(case.rows),
        "rows_flipped": int(case.flipped.sum()),
        **numbers,
        **perplexity,
        "positions": [{"sequence": s, "position": p} for s, p in where],
        "error": binned(at),
        "noise": binned(noise),
        "heat_layers": case.heat_layers,
        "heat": columns.tolist(),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
