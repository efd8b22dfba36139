"""690 GB of structure in a few MB: right in every header, empty in every value."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.common.errors import CheckpointError, OutputError
from seekforge.exporter.checkpoint import sparse
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.exporter.checkpoint.validate import check_structure, scan_values
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full model, sparse."""
    folder = tmp_path_factory.mktemp("sparse") / "full"
    try:
        written = new_sparse_checkpoint(folder, "full")
    except OutputError as error:
        pytest.skip(f"the temporary folder cannot hold sparse files of this size: {error}")
    assert written.num_parameters == 685_355_329_792
    assert written.disk_bytes < 50e6
    return folder


def test_true_size_and_structure(full: Path) -> None:
    with Checkpoint.open(full) as checkpoint:
        check_structure(checkpoint, ModelConfig.load(full))
        assert len(checkpoint.shards) == 163
        assert "model-00163-of-000163.safetensors" in checkpoint.shards
        data = sum(checkpoint.info(name).num_bytes for name in checkpoint.names)
        assert data == 689_469_018_240
        assert 0 < sum(checkpoint.shards.values()) - data < 20e6  # headers


def test_values_are_refused_where_they_matter(full: Path) -> None:
    checkpoint, config = Checkpoint.open(full), ModelConfig.load(full)
    scale = "model.layers.60.mlp.experts.255.down_proj.weight_scale_inv"
    with pytest.raises(CheckpointError, match=r"holds 0\.0 at \[0, 0\].*written without values"):
        scan_values(checkpoint, config, names=[scale])


def test_a_file_system_that_stores_holes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_write_with_hole", lambda path, head, size: path.write_bytes(head + bytes(size)))
    with pytest.raises(OutputError, match="stores the holes of sparse files"):
        new_sparse_checkpoint(tmp_path / "out", "tiny")
    assert not list(tmp_path.iterdir())
