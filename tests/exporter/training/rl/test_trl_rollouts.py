"""TRL's trainer samples from an engine: what it gets, and that the engine follows its weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.oracle import load_oracle, write_dequantized

from seekforge import LLM, SamplingParams
from seekforge.common.errors import OptionError
from seekforge.exporter.models.shared.weights import to_torch
from seekforge.exporter.training.rl.trl_rollouts import TrlRollouts, checkpoint_tensors
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.value_check import SCALE_SUFFIX
from seekforge.plugins.quant import dequantize_weight
from seekforge.runtime.rollout import RolloutEngine

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model with the weights of `tiny_checkpoint`."""
    return load_oracle(write_dequantized(tiny_checkpoint, tmp_path_factory.mktemp("oracle") / "f32"))


def test_the_weights_of_transformers_are_those_of_the_checkpoint(
    trained: Any, tiny_config: ModelConfig, tiny_source: Checkpoint
) -> None:
    tensors = checkpoint_tensors(trained.state_dict(), tiny_config)
    drafts = f"model.layers.{tiny_config.num_hidden_layers}."
    assert set(tensors) == {name for name in tiny_source.names if not name.startswith(drafts)}
    for name, value in tensors.items():
        if name + SCALE_SUFFIX in tensors:  # a block may be written with half the scale: its values are compared
            values = [
                dequantize_weight(to_torch(of[name]), to_torch(of[name + SCALE_SUFFIX]))
                for of in (tensors, {one: tiny_source.tensor(one) for one in (name, name + SCALE_SUFFIX)})
            ]
            assert value.dtype == tiny_source.tensor(name).dtype and torch.equal(*values), name
        elif not name.endswith(SCALE_SUFFIX):
            assert value.tobytes() == tiny_source.tensor(name).tobytes(), name
    with pytest.raises(OptionError, match=r"odd\.weight \(2,\) of the trained model is no tensor in"):
        checkpoint_tensors({"odd.weight": torch.zeros(2)}, tiny_config)


def test_a_group_is_as_large_as_its_prompt_stands_often(tiny_engines: dict[str, Path], trained: Any) -> None:
    """The trainer is a stand-in; the weights that it has are sampled with."""
    args = SimpleNamespace(temperature=1.0, seed=3)
    trainer = SimpleNamespace(
        args=args,
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model=trained,
    )
    with LLM(tiny_engines["exact"], num_blocks=20, threads=1, self_check=False) as llm:
        rollouts = TrlRollouts(RolloutEngine(llm, record=[]), PARAMS)
        conversation = [{"role": "user", "content": "one"}]
        prompts = ["Hello", "Hello", "a b", conversation, conversation]
        given = rollouts(prompts, trainer)
        assert {len(values) for values in given.values()} == {5} and rollouts.num_updates == llm.weight_version == 1
        encoded = [llm.get_tokenizer().encode("Hello"), llm.get_tokenizer().encode("a b")]
        assert [given["prompt_ids"][place] for place in (0, 1, 2)] == [encoded[0], encoded[0], encoded[1]]
        assert given["completion_ids"][0] != given["completion_ids"][1] and given["weight_version"] == [1] * 5
        ids = torch.tensor([given["prompt_ids"][2] + given["completion_ids"][2]])
        with torch.no_grad():
            rows = trained(ids).logits[0].log_softmax(-1)
        behind = len(given["prompt_ids"][2]) - 1
        values = rows[behind:-1].gather(1, ids[0, behind + 1 :, None]).flatten()
        assert np.abs(values.numpy() - given["logprobs"][2]).max() < 1e-4
        rollouts(prompts[:1], trainer)
        assert llm.weight_version == 1  # the step is the same: so are the weights
        args.temperature = 0.7
        with pytest.raises(OptionError, match=r"temperature is 0\.7, expected 1\.0"):
            rollouts(prompts, trainer)
        with pytest.raises(OptionError, match=r"params have top_p 0\.9"):
            TrlRollouts(RolloutEngine(llm), SamplingParams(temperature=1.0, top_p=0.9))


@pytest.mark.slow
def test_trl_trains_with_an_engine_that_samples(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="needs the extra 'trl'")
    datasets = pytest.importorskip("datasets", reason="needs the extra 'trl'")
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    eos = "<｜end▁of▁sentence｜>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_checkpoint / "tokenizer.json"), eos_token=eos, pad_token=eos
    )
    versions: list[int] = []

    def reward(completion_ids: list[list[int]], weight_version: list[int], **_: object) -> list[float]:
        versions.extend(weight_version)
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no", "bf16": False}
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_steps=2,
        learning_rate=1e-3,
        temperature=1.0,
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )
    with LLM(tiny_engines["exact"], num_blocks=40, threads=1, self_check=False) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        before = llm.generate("Hello", greedy)[0].outputs[0].token_ids
        rollouts = TrlRollouts(RolloutEngine(llm, record=[]), PARAMS)
        dataset = datasets.Dataset.from_dict({"prompt": ["Hello", "One two", "What is", "abc"]})
        trainer = GRPOTrainer(
            model=trained,
            reward_funcs=reward,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            rollout_func=rollouts,
        )
        trainer.train()
        assert versions == [1] * 4 + [2] * 4 and rollouts.num_updates == 2
        assert llm.generate("Hello", greedy)[0].outputs[0].token_ids != before
