"""PyTorch beside an engine with experts in NVFP4 has them too: what is compared is the engine, not its precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seekforge.exporter.models.shared.moe import Experts
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.api import parity
from seekforge.exporter.parity.compare.rank_errors import _weights_of
from seekforge.exporter.parity.torch_walks import REFERENCE, Walker
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.dump import CHECKPOINT, NVFP4_EXPERTS, Dump
from seekforge.formats.numerics import EXACT
from seekforge.formats.parity_steps import make_plan


@pytest.fixture(scope="module")
def dumped(tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of a model with experts in NVFP4."""
    work = tmp_path_factory.mktemp("dumped")
    settings = Settings(tiny_config, EXACT, "f32", nvfp4_experts=True)
    sizes = {"vocab_size": tiny_config.vocab_size, "index_topk": tiny_config.index_topk}
    plan = make_plan(contexts=(20,), has_mtp=False, modes=("whole",), **sizes)
    (work / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
    Walker(settings, tiny_source, "tiny").run(plan, work, kinds=(REFERENCE,))
    return work / REFERENCE


def test_a_dump_says_so_and_pytorch_computes_with_the_same_rows(dumped: Path, tiny_checkpoint: Path) -> None:
    assert Dump.open(dumped).side.weights == NVFP4_EXPERTS
    assert parity(from_dump=dumped, checkpoint=tiny_checkpoint).passed


def test_against_the_weights_of_the_checkpoint_it_is_another_model(
    dumped: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in dumped.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    index = other / "dump.json"
    text = index.read_text(encoding="utf-8")
    assert f'"{NVFP4_EXPERTS}"' in text
    index.write_text(text.replace(f'"{NVFP4_EXPERTS}"', f'"{CHECKPOINT}"'), encoding="utf-8")
    assert not parity(from_dump=other, checkpoint=tiny_checkpoint).passed


@pytest.mark.parametrize("is_dealt", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_of_ranks_add_up_to_the_product(
    tiny_config: ModelConfig, tiny_source: Checkpoint, ranks: int, is_dealt: bool
) -> None:
    settings = Settings(tiny_config, EXACT, "f32", nvfp4_experts=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seekforge.exporter.models.shared.weights.WIDE_BYTES", 0)
        module = TorchSession(settings, tiny_source).module()
    experts = module.get_submodule("layers.1.mlp.experts")
    assert isinstance(experts, Experts) and experts.w2.dtype == torch.int8
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, tiny_config.hidden_size, generator=draw)
    ids = torch.tensor([[0, 5], [9, 15], [2, 3]], dtype=torch.int32)
    weights = torch.ones(3, 2)
    whole, total = experts(x, ids, weights), torch.zeros_like(x)
    for place in range(ranks):
        with _weights_of(experts, place, ranks, is_dealt=is_dealt):
            total += experts(x, ids, weights)
    torch.testing.assert_close(total, whole)
    assert whole.abs().max() > 0
