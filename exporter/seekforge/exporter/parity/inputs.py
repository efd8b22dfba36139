"""What a check reads, and checks at the border: prompts and the plan made of them, the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seekforge.common.dtypes import widen
from seekforge.common.errors import ConfigError, OptionError
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.checkpoint.validate import scan_values
from seekforge.exporter.parity.torch_walks import without
from seekforge.exporter.program.layers import check_range, parse_layers, truncate
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.tokenizer_file import read_tokenizer
from seekforge.formats.numerics import NUMERICS, Numerics, numerics_from_dict
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.parity_steps import MODES, Mode, ParitySteps, make_plan, read_prompts


@dataclass(frozen=True)
class ParityOptions:
    """The options of `seekforge parity` that say what to compare; its help explains them."""

    engine: Path | None
    checkpoint: Path | None
    prompts: Path | None
    contexts: tuple[int, ...]
    modes: tuple[Mode, ...]
    against: str
    layers: str | None
    numerics: str | None
    without: tuple[str, ...]
    sensitivity: bool
    write_self_check: bool
    max_kl: float | None
    max_dump_size: int
    threads: int | None
    seed: int


def plan_of(
    options: ParityOptions, config: ModelConfig, tokenizer: Path, *, has_mtp: bool, longest: int
) -> ParitySteps:
    """Return the steps that the options say.

    Args:
        options: the options.
        config: the model's configuration.
        tokenizer: the file that encodes prompts.
        has_mtp: whether the draft layer takes part.
        longest: tokens that the engine, or without one the model, accepts.

    Raises:
        ConfigError: a context or a prompt is longer than `longest`, or the file of prompts is none.
    """
    modes: tuple[Mode, ...] = tuple(mode for mode in MODES if mode in options.modes)
    who = "model" if options.engine is None else "engine"
    prompts: list[list[int]] = []
    contexts: tuple[int, ...] = ()
    if options.prompts is not None:
        prompts = _encoded_prompts(options.prompts, tokenizer, longest)
    elif options.contexts:
        contexts = options.contexts
    else:
        border = config.index_topk or BLOCK_SIZE
        contexts = tuple(sorted({min(n, longest) for n in (16, border + 8, 2 * border)}))
    if max(contexts, default=0) > longest:
        raise ConfigError(f"--contexts has {max(contexts)}, the {who} accepts {longest} tokens")
    return make_plan(
        contexts=contexts, vocab_size=config.vocab_size, index_topk=config.index_topk, has_mtp=has_mtp, modes=modes,
        prompts=prompts, seed=options.seed,
    )  # fmt: skip


def _encoded_prompts(path: Path, tokenizer: Path, longest: int) -> list[list[int]]:
    """Return the token ids of each prompt of a file; what is far beyond `longest` tokens is not encoded."""
    lines = read_prompts(path)
    if not tokenizer.exists():
        raise ConfigError(f"{tokenizer}: missing; --prompts needs the tokenizer")
    encoder = read_tokenizer(tokenizer, error=ConfigError, again="take the tokenizer.json of the checkpoint")
    room = longest * max(map(len, encoder.get_vocab()), default=1)  # no token has more characters
    prompts: list[list[int]] = []
    for number, line in enumerate(lines):
        ids = encoder.encode(line, add_special_tokens=False).ids if len(line) <= room else None
        if ids is None or len(ids) > longest:
            has = f"{len(line):,} characters" if ids is None else f"{len(ids)} tokens"
            raise ConfigError(f"{path}: prompt {number} has {has}, {longest} tokens are accepted here")
        if not ids:
            raise ConfigError(f"{path}: the prompt {line!r} encodes to no token")
        prompts.append(ids)
    return prompts


def numerics_of(options: ParityOptions, side: dict[str, object]) -> Numerics:
    """Return the numerics of the PyTorch side: those of the options, or else the other side's."""
    chosen = NUMERICS[options.numerics] if options.numerics else numerics_from_dict(side)
    return without(chosen, options.without)


class ScannedCheckpoint:
    """An open checkpoint whose every tensor is checked when it is first read.

    NaN in a file is a damaged download and no fault of an engine that was built from a whole one.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._expected = expected_tensors(config)
        self._seen: set[str] = set()

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor, as `Checkpoint.tensor`, in the dtype that it has in the plain form of a checkpoint.

        Raises:
            CheckpointError: it holds values that no model has.
        """
        if name not in self._seen:
            scan_values(self._checkpoint, self._config, [name])
            self._seen.add(name)
        array, expected = self._checkpoint.tensor(name), self._expected.get(name)
        return array if expected is None else widen(array, expected.dtype)


@contextlib.contextmanager
def open_source(folder: Path, config: ModelConfig) -> Iterator[ScannedCheckpoint]:
    """Open a checkpoint that belongs to a model of this config (the whole of it, or its first layers).

    Raises:
        ConfigError, CheckpointError: it belongs to another model, or is damaged.
    """
    with open_checkpoint(folder) as opened:
        check_config(folder, opened.config, config)
        yield ScannedCheckpoint(opened.checkpoint, opened.config)


def check_config(folder: Path, of_checkpoint: ModelConfig, config: ModelConfig) -> None:
    """Refuse a checkpoint of another model than an engine's, the whole of it or its first layers.

    Raises:
        ConfigError: naming the first key that differs.
    """
    if of_checkpoint.num_hidden_layers > config.num_hidden_layers and config.mtp_layer is None:
        of_checkpoint = truncate(of_checkpoint, config.num_hidden_layers)
    different = config.first_difference(of_checkpoint)
    if different is not None:
        key, expected, actual = different
        raise ConfigError(
            f"{folder}: {key} is {actual}, the engine's model has {expected}; pass the checkpoint of that model"
        )


def need_checkpoint(options: ParityOptions, what: str) -> Path:
    """Return the checkpoint's folder.

    Raises:
        OptionError: there is none.
    """
    if options.checkpoint is None:
        raise OptionError(f"{what} needs --checkpoint, the folder with the weights")
    return options.checkpoint


def range_of(options: ParityOptions, config: ModelConfig) -> tuple[int, int] | None:
    """Return the layers [a, b) to look at; None: all."""
    if options.layers is None:
        return None
    layers = parse_layers(options.layers)
    check_range(layers, config)
    return layers
