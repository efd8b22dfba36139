"""Which operators have no kernel on a GPU is known at build: by name and type, in inner graphs too."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from seekforge.common.cli.console import Stages
from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.exporter.builder.onnxruntime import build as cpu_build
from seekforge.exporter.builder.onnxruntime.cuda_operators import on_the_cpu
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.targets import load_target


def graph_of(*nodes: onnx.NodeProto, **inputs: int) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, kind, ["N"]) for name, kind in inputs.items()]
    graph = helper.make_graph(list(nodes), "g", values, [])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    )


def test_operators_are_told_by_their_type() -> None:
    pads = helper.make_node("Constant", [], ["pads"], value_ints=[0, 1])
    nodes = [helper.make_node("Pad", [name, "pads"], [f"p{name}"]) for name in ("x", "i", "j")]
    model = graph_of(pads, *nodes, x=TensorProto.FLOAT, i=TensorProto.INT64, j=TensorProto.INT64)
    assert on_the_cpu(model) == {"Pad i64": 2}


def test_an_inner_graph_counts_and_the_unknown_is_on_the_cpu() -> None:
    inner = helper.make_graph(
        [helper.make_node("Clip", ["i"], ["c"])],
        "inner",
        [],
        [helper.make_tensor_value_info("c", TensorProto.INT32, None)],
    )
    branch = helper.make_node("If", ["b"], ["o"], then_branch=inner, else_branch=inner)
    other = helper.make_node("QMoE", ["x"], ["q"], domain="com.microsoft")
    model = graph_of(branch, other, b=TensorProto.BOOL, i=TensorProto.INT32, x=TensorProto.FLOAT)
    assert on_the_cpu(model) == {"Clip i32": 2, "QMoE f32": 1}


@pytest.fixture
def cuda_engine(tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> Path:
    out = tmp_path / "engine"
    cpu_build.build(
        tiny_programs["exact"],
        out,
        target=load_target("ort-cuda", ["limits.max_model_len=1024"]),
        checkpoint_folder=tiny_checkpoint,
        force=False,
        progress=Stages(quiet=True),
    )
    return out


def test_the_engine_says_what_its_gpu_leaves_to_the_cpu(cuda_engine: Path) -> None:
    manifest = load_manifest(cuda_engine)
    assert (manifest.target.backend, manifest.target.provider) == ("onnxruntime", "cuda")
    left = manifest.build["on_the_cpu"]
    # no product, no norm and no attention: indices that are padded alone
    assert set(left["model"]) <= {"Pad i64", "Pad i32"} and sum(left["model"].values()) < 20
    # what the library of CPU operators has would lie on the CPU, so nothing is fused and nothing left a function
    graphs = [onnx.load(cuda_engine / f"{name}.onnx", load_external_data=False) for name in left]
    assert all(not graph.functions for graph in graphs)
    assert {node.domain for graph in graphs for node in graph.graph.node} == {""}


def test_codes_are_refused_by_name() -> None:
    for setting in ("precision=int8", "precision=int4", "lm_head=int8"):
        with pytest.raises(TargetError, match=r"CUDA provider has no QMoE for f32 inputs.*take precision f32"):
            load_target("ort-cuda", [setting])
    with pytest.raises(TargetError, match="provider is for onnxruntime"):
        load_target("h100", ["provider=cuda"])


def test_both_packages_side_by_side_are_refused_before_work(
    monkeypatch: pytest.MonkeyPatch, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        cpu_build, "onnxruntime_conflict", lambda: "onnxruntime 1 and onnxruntime-gpu 1 are both installed"
    )
    with pytest.raises(EnvironmentFault, match="both installed"):
        cpu_build.check(
            tiny_programs["exact"], tmp_path / "out", target=load_target("cpu"), checkpoint_folder=tiny_checkpoint
        )
