"""A program's graph that `export` could not have written is refused in one line, whatever is done with it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from seekforge.common.errors import EngineError, ProgramError
from seekforge.exporter.builder.request import read_engine_graph, read_graph
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.program import load_program
from seekforge.runtime.cli.main import main


def _external(model: onnx.ModelProto, tensor: onnx.TensorProto, place: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)


def _external_initializer(model: onnx.ModelProto) -> None:
    _external(model, model.graph.initializer[0], "../../etc/passwd")


def _external_beside(model: onnx.ModelProto) -> None:
    _external(model, model.graph.initializer[0], "program.json")


def _external_in_a_function(model: onnx.ModelProto) -> None:
    node = model.functions[0].node.add(op_type="Constant", output=["odd"])
    value = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [1.0])
    node.attribute.append(onnx.helper.make_attribute("value", value))
    _external(model, node.attribute[0].t, "/etc/passwd")


def _external_in_a_graph_of_a_node(model: onnx.ModelProto) -> None:
    value = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [1.0])
    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[value])
    _external(model, inner.initializer[0], "/etc/passwd")
    node = model.functions[0].node.add(op_type="If", input=["x"], output=["y"])
    node.attribute.append(onnx.helper.make_attribute("then_branch", inner))


def _calls_itself(model: onnx.ModelProto) -> None:
    function = model.functions[0]
    node = function.node.add(op_type=function.name, domain=function.domain)
    node.input.extend(function.input)
    node.output.extend(f"{name}_again" for name in function.output)


def _doubles(model: onnx.ModelProto) -> None:
    for level in range(40):
        function = model.functions.add(name=f"B{level}", domain="bomb", input=["x"], output=["y"])
        function.opset_import.extend(model.opset_import)
        function.opset_import.add(domain="bomb", version=1)
        if level == 0:
            function.node.add(op_type="Identity", input=["x"], output=["y"])
        else:
            function.node.add(op_type=f"B{level - 1}", domain="bomb", input=["x"], output=["m"])
            function.node.add(op_type=f"B{level - 1}", domain="bomb", input=["m"], output=["y"])
    model.opset_import.add(domain="bomb", version=1)
    model.graph.node.add(op_type="B39", domain="bomb", input=[model.graph.input[0].name], output=["z"])


def _of_nodes(change: Callable[[onnx.NodeProto], object], domain: str | None = None) -> Callable:
    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if domain is None or node.domain == domain:
                change(node)

    return edit


def _graph_in_a_node(model: onnx.ModelProto) -> None:
    node = model.graph.node.add(op_type="If", input=["c"], output=["d"])
    node.attribute.append(onnx.helper.make_attribute("then_branch", onnx.helper.make_graph([], "g", [], [])))


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[5].input.append(model.graph.node[-1].output[0])


def _other_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7


EDITS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "a tensor outside": _external_initializer,
    "a tensor in a file beside": _external_beside,
    "a tensor outside, in a function": _external_in_a_function,
    "a tensor outside, in a graph of a node of a function": _external_in_a_graph_of_a_node,
    "a function that calls itself": _calls_itself,
    "functions that double": _doubles,
    "no inputs": _of_nodes(lambda node: node.ClearField("input")),
    "no outputs": _of_nodes(lambda node: node.ClearField("output")),
    "operators without inputs": _of_nodes(lambda node: node.ClearField("input"), "seekforge"),
    "operators with fewer inputs": _of_nodes(lambda node: node.input.pop(), "seekforge"),
    "no attributes": _of_nodes(lambda node: node.ClearField("attribute"), "seekforge"),
    "attributes of another type": _of_nodes(
        lambda node: node.attribute[0].CopyFrom(onnx.helper.make_attribute(node.attribute[0].name, [1.5])), "seekforge"
    ),
    "an operator of nobody": _of_nodes(lambda node: setattr(node, "op_type", "Evil\x1b[31m"), "seekforge"),
    "a domain of nobody": _of_nodes(lambda node: setattr(node, "domain", "evil")),
    "a graph in a node": _graph_in_a_node,
    "a cycle": _cycle,
    "no graph": lambda model: model.ClearField("graph"),
    "inputs without types": lambda model: [value.ClearField("type") for value in model.graph.input],
    "an input of another shape": _other_shape,
    "no outputs of the graph": lambda model: model.graph.ClearField("output"),
    "inputs in another order": lambda model: model.graph.input.reverse(),
    "nothing": lambda model: model.Clear(),
}


def spoilt(source: Path, folder: Path, edit: Callable[[onnx.ModelProto], object] | bytes) -> Path:
    """Copy a program with another graph whose digest is right."""
    shutil.copytree(source, folder)
    raw = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    graph_io = raw["graphs"]["model"]
    if isinstance(edit, bytes):
        content = edit
    else:
        model = onnx.load(folder / graph_io["file"], load_external_data=False)
        edit(model)
        content = model.SerializeToString()
    (folder / graph_io["file"]).write_bytes(content)
    graph_io["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "program.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", EDITS)
def test_what_no_program_has_is_refused(name: str, tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    folder = spoilt(tiny_programs["fp8"], tmp_path / "program", EDITS[name])
    with pytest.raises(ProgramError, match=r"model.onnx: .*export the program again") as error:
        read_graph(folder, load_program(folder).graphs["model"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("numerics", ["exact", "fp8"])
def test_what_export_writes_is_not(numerics: str, tiny_programs: dict[str, Path]) -> None:
    folder = tiny_programs[numerics]
    for graph_io in load_program(folder).graphs.values():
        read_graph(folder, graph_io)


@pytest.mark.parametrize("where", ["output of a node", "input of the graph", "an operator's name"])
def test_text_that_is_no_utf8_is_refused(
    where: str, tiny_programs: dict[str, Path], tiny_engines: dict[str, Path], tmp_path: Path
) -> None:
    """Protobuf reads it and gives bytes, which cannot be sorted among names."""
    source = tiny_programs["fp8"]
    graph = onnx.load(source / load_program(source).graphs["model"].file, load_external_data=False).graph
    text = {
        "output of a node": graph.node[0].output[0],
        "input of the graph": graph.input[0].name,
        "an operator's name": graph.node[0].name,
    }[where].encode()
    raw = (source / load_program(source).graphs["model"].file).read_bytes()
    field = bytes([len(text)])  # of a text, its length stands before it
    assert field + text in raw
    folder = spoilt(source, tmp_path / "program", raw.replace(field + text, field + b"\xff" + text[1:]))
    with pytest.raises(ProgramError, match="is no UTF-8; export the program again"):
        read_graph(folder, load_program(folder).graphs["model"])
    (tmp_path / "model.onnx").write_bytes(raw.replace(field + text, field + b"\xff" + text[1:]))
    own = load_manifest(tiny_engines["fp8"]).graphs["model"].model_copy(update={"file": "model.onnx"})
    with pytest.raises(EngineError, match="is no UTF-8; build the engine again"):
        read_engine_graph(tmp_path, own)


@pytest.mark.parametrize(
    "how",
    [
        ["inspect", "{program}"],
        ["inspect", "{program}", "--graph", "dot"],
        ["build", "{program}", "{out}", "--target", "cpu", "--checkpoint", "{checkpoint}"],
        ["build", "{program}", "{out}", "--target", "rtx4090", "--checkpoint", "{checkpoint}", "--dry-run"],
    ],
    ids=["inspect", "draw", "cpu", "gpu"],
)
@pytest.mark.parametrize("edit", ["functions that double", b"\xff" * 5000])
def test_a_command_says_so_at_once(
    how: list[str],
    edit: str | bytes,
    tiny_programs: dict[str, Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before weights are scanned and before torch is imported."""
    program = spoilt(tiny_programs["fp8"], tmp_path / "program", edit if isinstance(edit, bytes) else EDITS[edit])
    monkeypatch.setitem(sys.modules, "seekforge.exporter.builder.onnxruntime.build", None)  # brings torch
    words = {"program": program, "out": tmp_path / "out", "checkpoint": tiny_checkpoint}
    done = CliRunner().invoke(main, [word.format(**words) for word in how])
    assert done.exit_code == 2, done.output + repr(done.exception)
    assert done.stderr.splitlines()[-1].startswith(f"error: {program}/model.onnx: ")
    assert not (tmp_path / "out").exists()
