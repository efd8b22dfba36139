"""Engines and reference forms on the same tasks, each with what it takes: the order of work of `parity --quality`.

The first entry is the PyTorch model in FP32 with the checkpoint's FP8 weights; all others are seen beside it. What does
not belong together is refused before anything is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np

from seekforge.common.cli.console import Stages
from seekforge.common.errors import ConfigError
from seekforge.common.paths import real_path
from seekforge.common.records import Record, finite
from seekforge.common.requirements import own_version
from seekforge.exporter.builder.generation import read_generation
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import expert_names
from seekforge.exporter.parity.inputs import check_config, open_source
from seekforge.exporter.parity.quality.forms import FORMS, WeightSizes
from seekforge.exporter.parity.quality.recall import Choices, Recall, measure_recall
from seekforge.exporter.parity.quality.torch_run import run_rows
from seekforge.exporter.quality import EncodedTasks, encode, run_engine
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import MANIFEST, Manifest, load_manifest
from seekforge.formats.engine.verify import listed_files
from seekforge.formats.engine.weight_file import WEIGHTS
from seekforge.formats.quality import FormName, QualityTasks, TaskQuality
from seekforge.formats.quality_run import DraftsRun, RunAnswer, RunRequest, RunRow, SpeedRun, selections_file
from seekforge.formats.weight_recipes import TensorSource

REPORT_FORMAT: Final = 1
#: Drafts of a step, of an engine that has the MTP module, which predicts one token.
_DRAFTS: Final = 1
#: Rows that are timed, and how often.
_TIMED, _ROUNDS = 6, 3
#: Rows on which choices of keys are looked at, and tokens of all of them.
_RECALL_ROWS, _RECALL_TOKENS = 16, 8192

_Number = Annotated[float, finite]


class QualityEntry(Record):
    """One line of the table.

    Attributes:
        name: the engine's folder, or the form.
        kind: `reference`: the PyTorch model; `engine`.
        does: what it is, in words.
        backend: pytorch, or what runs the engine.
        numerics: exact or fp8.
        weights, caches: how they are stored.
        weight_bytes: bytes of all weights; those of a form are what an engine would store.
        cache_bytes_per_token: over all layers, in the same way.
        tasks: what it made of each task.
        recall: what its indexers chose; None where no query sees more keys than they choose, or nothing shows.
        drafts, speed: what an engine was measured to do; None of a form.
    """

    name: str
    kind: Literal["reference", "engine"]
    does: str
    backend: str
    numerics: str
    weights: str
    caches: str
    weight_bytes: _Number
    cache_bytes_per_token: _Number
    tasks: tuple[TaskQuality, ...]
    recall: Recall | None = None
    drafts: DraftsRun | None = None
    speed: SpeedRun | None = None


class QualityReport(Record):
    """The table of `parity --quality`.

    Attributes:
        format: the version of this form of report.
        seekforge_version: what made it.
        checkpoint: name of its folder.
        model: facts of its config.
        tasks: name of the file, its digest, and how many rows it has.
        entries: the exact PyTorch model first, forms as they were named, engines as they were named.
        notes: what the reader should know.
    """

    format: int
    seekforge_version: str
    checkpoint: str
    model: dict[str, Any]
    tasks: dict[str, Any]
    entries: tuple[QualityEntry, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Engine:
    """An engine that is going to be measured."""

    folder: Path
    manifest: Manifest
    name: str


def check_quality(
    engines: Sequence[Path],
    checkpoint: Path,
    tasks: QualityTasks,
    forms: Sequence[FormName],
    *,
    threads: int | None,
    work: Path,
    stages: Stages,
) -> QualityReport:
    """Measure engines and forms of the PyTorch model.

    Args:
        engines: their folders.
        checkpoint: the weights of the PyTorch model, which must be the engines'.
        tasks: the tasks.
        forms: forms beside `exact`.
        threads: CPU threads of an engine; None: the cores this process may use.
        work: an empty folder.
        stages: told each stage.

    Raises:
        ConfigError, CheckpointError, EngineError: what is measured is damaged, or does not belong together; a row does
            not fit.
    """
    stages("read engines and checkpoint")
    with open_checkpoint(checkpoint) as opened:
        config, sizes = opened.config, _sizes(opened.checkpoint, opened.config)
    opened_engines = [_open(folder, name) for folder, name in zip(engines, _names(engines), strict=True)]
    longest = config.max_position_embeddings
    for one in opened_engines:
        check_config(checkpoint, config, ModelConfig.parse(one.manifest.config, str(one.folder / MANIFEST)))
        longest = min(longest, one.manifest.limits.max_model_len)
    encoded = encode(tasks, checkpoint / "tokenizer.json", longest=longest)
    for one in opened_engines:
        if encode(tasks, one.folder / one.manifest.tokenizer, longest=longest).rows != encoded.rows:
            raise ConfigError(f"{one.folder}: its tokenizer is not that of {checkpoint}; pass the engine's checkpoint")
    entries: list[QualityEntry] = []
    choices: dict[str, Choices] = {}
    watched = _watched(encoded.rows, config.index_topk)
    with open_source(checkpoint, config) as source:
        ends = read_generation(checkpoint, config).eos_token_ids
        for name in dict.fromkeys(("exact", *forms)):
            stages(f"PyTorch, {name}")
            entries.append(_measure_form(name, config, source, encoded, ends, sizes, stages))
        for number, one in enumerate(opened_engines):
            stages(f"engine {one.name}")
            folder = work / f"engine-{number}"
            folder.mkdir()
            answer = run_engine(
                one.folder,
                _request(one.manifest, encoded, watched, checkpoint, threads),
                folder,
                say=stages.update,
            )
            choices[str(len(entries))] = _choices(folder, watched)
            entries.append(_engine_entry(one, encoded, answer))
        if watched:
            stages("attention of PyTorch")
            sequences = {row: encoded.rows[row].ids for row in watched}
            recalls = measure_recall(config, source, sequences, choices, reference="0", say=stages.update)
            entries = [one.model_copy(update={"recall": recalls.get(str(i))}) for i, one in enumerate(entries)]
    return QualityReport(
        format=REPORT_FORMAT,
        seekforge_version=own_version(),
        checkpoint=real_path(checkpoint).name,
        model={key: getattr(config, key) for key in _MODEL_KEYS},
        tasks={"file": tasks.path.name, "sha256": tasks.sha256, "num_rows": len(tasks.rows)},
        entries=tuple(entries),
        notes=tuple(_notes(entries, watched, config)),
    )


_MODEL_KEYS: Final = ("model_type", "num_hidden_layers", "hidden_size", "n_routed_experts", "index_topk", "vocab_size")


def _names(engines: Sequence[Path]) -> list[str]:
    """Return a name of each engine: of its folder, with the one above where two folders are called alike."""
    names = [real_path(folder).name for folder in engines]
    long = ["/".join(real_path(folder).parts[-2:]) for folder in engines]
    return [full if names.count(name) > 1 else name for name, full in zip(names, long, strict=True)]


def _open(folder: Path, name: str) -> _Engine:
    manifest = load_manifest(folder)
    listed_files(folder, manifest)
    if manifest.layer_range != (0, int(manifest.config["num_hidden_layers"])):
        first, stop = manifest.layer_range
        raise ConfigError(f"{folder}: is a stage of layers {first}-{stop - 1}, and gives no text; pass whole engines")
    return _Engine(folder, manifest, name)


def _routed(config: ModelConfig) -> set[str]:
    """Return the names of all tensors of routed experts."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    tensors = ((layer, one) for layer in layers for one in family_of(config).layer_tensors(config, layer))
    return {
        name
        for layer, tensor in tensors
        if tensor.sharding == "experts"
        for name in expert_names(tensor, f"model.layers.{layer}.")
    }


def _sizes(checkpoint: Checkpoint, config: ModelConfig) -> WeightSizes:
    """Return what a checkpoint holds."""
    routed = _routed(config)
    fp8 = experts = others = scales = 0
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if info.dtype == "f8e4m3":
            fp8 += info.num_bytes
            experts += info.num_bytes if name in routed else 0
        elif name.endswith("_scale_inv"):
            scales += info.num_bytes
        else:
            others += info.num_bytes
    return WeightSizes(fp8, experts, others, scales)


def _watched(rows: Sequence[RunRow], index_topk: int | None) -> list[int]:
    """Return the longest rows, of which some queries see more keys than an indexer chooses."""
    if not index_topk:
        return []
    watched: list[int] = []
    total = 0
    for number in sorted(range(len(rows)), key=lambda number: (-len(rows[number].ids), number)):
        length = len(rows[number].ids)
        if length > index_topk and len(watched) < _RECALL_ROWS and total + length <= _RECALL_TOKENS:
            watched.append(number)
            total += length
    return sorted(watched)


def _measure_form(
    name: FormName,
    config: ModelConfig,
    source: TensorSource,
    encoded: EncodedTasks,
    ends: tuple[int, ...],
    sizes: WeightSizes,
    stages: Stages,
) -> QualityEntry:
    form = FORMS[name]
    completions, nll_sums = run_rows(form.session(config, source), encoded.rows, ends, say=stages.update)
    return QualityEntry(
        name=name,
        kind="reference",
        does=form.does,
        backend="pytorch",
        numerics=form.numerics.name,
        weights=form.weights,
        caches=form.caches,
        weight_bytes=form.weight_bytes(sizes),
        cache_bytes_per_token=form.cache_bytes(config),
        tasks=encoded.score(completions, nll_sums, ends),
    )


def _request(
    manifest: Manifest, encoded: EncodedTasks, watched: Sequence[int], checkpoint: Path, threads: int | None
) -> RunRequest:
    prompts = [number for number, row in enumerate(encoded.rows) if row.max_tokens]
    timed = prompts[:: max(1, len(prompts) // _TIMED)][:_TIMED]
    shows = any(spec.name.startswith("topk_indices.") for spec in manifest.graphs["model"].outputs)
    return RunRequest(
        rows=encoded.rows,
        selections=tuple(watched) if shows else (),
        num_speculative_tokens=_DRAFTS if "mtp" in manifest.graphs and prompts else 0,
        timed=tuple(timed),
        rounds=_ROUNDS,
        threads=threads,
        checkpoint=str(checkpoint) if manifest.weights is not None else None,
    )


def _choices(folder: Path, watched: Sequence[int]) -> Choices:
    """Read what an engine's indexers chose."""
    choices: dict[int, Mapping[int, np.ndarray]] = {}
    for row in watched:
        path = folder / selections_file(row)
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                choices[row] = {int(name.rpartition(".")[2]): arrays[name] for name in arrays.files}
    return choices


def _engine_entry(engine: _Engine, encoded: EncodedTasks, answer: RunAnswer) -> QualityEntry:
    manifest, target = engine.manifest, engine.manifest.target
    numerics, kv = str(manifest.numerics["name"]), manifest.cache.kv_format
    precision = str(manifest.build.get("precision", "f32" if target.backend == "onnxruntime" else "fp8"))
    if manifest.audit is not None:
        weight_bytes = manifest.audit.weight_input_bytes
    else:
        weight_bytes = sum(file.bytes for file in manifest.files if file.path == WEIGHTS)
    return QualityEntry(
        name=engine.name,
        kind="engine",
        does=f"{target.name}: {precision} weights, {numerics} numerics, caches in {kv}",
        backend=target.backend,
        numerics=numerics,
        weights=precision,
        caches=kv,
        weight_bytes=weight_bytes,
        cache_bytes_per_token=manifest.cache.bytes_per_block / manifest.cache.block_size,
        tasks=encoded.score(answer.completions, answer.nll_sums, manifest.eos_token_ids),
        drafts=answer.drafts,
        speed=answer.speed,
    )


def _notes(entries: Sequence[QualityEntry], watched: Sequence[int], config: ModelConfig) -> list[str]:
    notes = []
    if config.index_topk and not watched:
        notes.append(
            f"no row has more than index_topk = {config.index_topk} tokens: indexers chose every key, and nothing is "
            "said of their recall"
        )
    if any(one.kind == "reference" and one.name != "exact" for one in entries):
        notes.append("bytes of reference forms are those that an engine would store")
    return notes
