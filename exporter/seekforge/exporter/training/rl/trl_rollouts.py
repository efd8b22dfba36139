"""TRL's GRPOTrainer with an engine that samples: its `rollout_func` (extra `trl`).

The trainer holds transformers' model; before it samples with other weights than the engine has, they are quantized as a
checkpoint holds them and swapped in. TRL is imported by nobody here: it calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import OptionError
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.models.parameters import EXPERT
from seekforge.exporter.models.shared.parameters import STACKED_EXPERTS
from seekforge.exporter.training.weights import check_form
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.quantization.block_fp8 import quantize
from seekforge.formats.value_check import SCALE_SUFFIX

if TYPE_CHECKING:
    from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]


class TrlRollouts:
    """What GRPOTrainer takes as `rollout_func`.

    Attributes:
        engine: the `seekforge.runtime.rollout.RolloutEngine`.
        num_updates: how often the engine was given weights.

    Example:
        >>> engine = RolloutEngine(LLM("engine"), record=[])
        >>> GRPOTrainer(model, reward, args, rollout_func=TrlRollouts(engine, SamplingParams(max_tokens=96)), ...)
    """

    def __init__(self, engine: Any, params: Any, *, chat: Mapping[str, Any] | None = None) -> None:
        """Make one.

        Args:
            engine: a `RolloutEngine` of the model that is trained.
            params: `SamplingParams`; `n` is the trainer's. Of the model alone, since TRL takes its log-probabilities
                for those that tokens were sampled with: temperature 1, no top-p, top-k, min-p or penalties.
            chat: options of `LLM.chat` for prompts that are conversations, such as `chat_template_kwargs`.

        Raises:
            OptionError: `params` change probabilities.
        """
        plain = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "best_of": None}
        wrong = [name for name, value in plain.items() if getattr(params, name) not in (value, -1)]
        if wrong or params.edits_logits:
            what = f"{wrong[0]} {getattr(params, wrong[0])}" if wrong else "penalties, bans or forms"
            raise OptionError(f"TrlRollouts: params have {what}, expected those that sample from the model alone")
        self.engine, self.params, self.chat = engine, params, dict(chat or {})
        self.num_updates = self._num_calls = 0
        self._config = ModelConfig.parse(engine.llm.engine.manifest.config, "the engine")
        self._step: int | None = None

    def __call__(self, prompts: Sequence[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """Sample one completion for each of `prompts`, in which a prompt stands as often as its group is large.

        Args:
            prompts: texts, or conversations.
            trainer: the trainer, whose weights are sampled with.

        Returns:
            prompt_ids, completion_ids, logprobs, and weight_version, each with an entry per prompt.

        Raises:
            OptionError: the trainer's temperature is not 1.
        """
        if trainer.args.temperature != 1.0:
            raise OptionError(f"TrlRollouts: the trainer's temperature is {trainer.args.temperature}, expected 1.0")
        if self._step != trainer.state.global_step:
            model = trainer.accelerator.unwrap_model(trainer.model)
            self.engine.update_weights(checkpoint_tensors(model.state_dict(), self._config))
            self.num_updates += 1
            self._step = trainer.state.global_step
        runs = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        rollouts: dict[int, list[Any]] = {}
        for count in sorted({count for _, count in runs}):
            places = [place for place, (_, size) in enumerate(runs) if size == count]
            self._num_calls += 1
            groups = self.engine.generate(
                [self._prompt(runs[place][0]) for place in places],
                replace(self.params, n=count),
                seed=trainer.args.seed * 1_000_003 + self._num_calls,
            )
            rollouts |= dict(zip(places, groups))
        every = [one for place in range(len(runs)) for one in rollouts[place]]
        return {
            "prompt_ids": [list(one.prompt_token_ids) for one in every],
            "completion_ids": [list(one.token_ids) for one in every],
            "logprobs": [one.logprobs.tolist() for one in every],
            "weight_version": [one.weight_version for one in every],
        }

    def _prompt(self, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return prompt
        return self.engine.llm.chat_request(prompt, self.params, **self.chat).prompt


def checkpoint_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the weights of transformers' model as a checkpoint holds them, with FP8 weights in blocks.

    Args:
        state: `state_dict()` of transformers' model of this family; tensors on any device.
        config: the configuration of the checkpoint.

    Raises:
        OptionError: a tensor is not of this model.
        ConfigError: the checkpoint's weights are neither in FP8 blocks nor in BF16.
    """
    check_form(config)
    expected = expected_tensors(config)
    tensors: dict[str, np.ndarray] = {}
    for name, value in _unstacked(state):
        tensor = expected.get(name)
        if tensor is None or tuple(value.shape) != tensor.shape:
            what = "no tensor" if tensor is None else f"of shape {tensor.shape}"
            raise OptionError(f"{name} {tuple(value.shape)} of the trained model is {what} in the engine's checkpoint")
        values = value.detach().to("cpu", torch.float32).numpy()
        if tensor.dtype == "f8e4m3":
            tensors[name], tensors[name + SCALE_SUFFIX] = quantize(np.ascontiguousarray(values))
        else:
            tensors[name] = values.astype(NUMPY[tensor.dtype])
    return tensors


def _unstacked(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        stacked = next((end for end in STACKED_EXPERTS if name.endswith(end)), None)
        if stacked is None:
            yield name, value
            continue
        prefix, parts = name.removesuffix(stacked), STACKED_EXPERTS[stacked]
        for expert, matrix in enumerate(value):
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                yield prefix + part.replace(EXPERT, str(expert)), rows
