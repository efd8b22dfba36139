"""An operator is a folder and its place in the registry: all else reads its description."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import seekforge.plugins
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.formats.numerics import FP8
from seekforge.formats.parallelism import ONE_RANK
from seekforge.formats.targets import NVFP4_SM
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.operator import (
    NO_TAPS,
    FoldedForm,
    KernelForm,
    Operator,
    OpSpec,
    Products,
    RankModel,
    Step,
    Taps,
    load,
)
from seekforge.plugins.registry import (
    ADD_RMS_NORM_QUANTIZE,
    BF16_LINEAR,
    BLOCK_FP8_LINEAR,
    CACHE_OPS,
    FP8_OPS,
    KERNEL_FORMS,
    OPERATORS,
    SPECS,
)

ROOTS = [Path(__file__).parents[2] / root for root in ("exporter", "plugins", "runtime")]
PLUGINS = Path(seekforge.plugins.__path__[0])
FOLDERS = {path.parent.name for path in PLUGINS.glob("*/spec.py")}

CONFIG = load_preset("full").config
MODEL = RankModel(config=CONFIG, numerics=FP8.model_dump(), kv_format="fp8_ds", parallelism=ONE_RANK)
DENSE = dataclasses.replace(MODEL, config=load_preset("tiny-v3").config, kv_format="bf16")
STEP = Step(
    batch=2, queries=3, num_blocks=40, expert_tokens=6, fp8_linears=[(256, 384)], bf16_linears=[(128, 384), (64, 384)]
)


def test_every_folder_with_a_contract_is_registered_under_its_name() -> None:
    assert {spec.torch_name for spec in SPECS.values()} == FOLDERS
    for op, operator in OPERATORS.items():
        here = importlib.import_module(f"seekforge.plugins.{operator.spec.torch_name}.operator")
        assert here.OPERATOR is operator and operator.spec.name == op


def test_every_folder_has_the_parts_of_an_operator() -> None:
    parts = {"__init__", "function", "op", "operator", "reference", "spec", "vectors"}
    for op, operator in OPERATORS.items():
        names = {path.stem for path in (PLUGINS / operator.spec.torch_name).glob("*.py")}
        wanted = parts | ({"kernel", "launch"} if op in KERNEL_FORMS else set())
        assert wanted <= names, op


@pytest.mark.parametrize("kind", [Operator, KernelForm, Products, Taps, FoldedForm])
def test_a_description_that_leaves_something_out_is_an_error(kind: type[Any]) -> None:
    operator = OPERATORS[BLOCK_FP8_LINEAR]
    parts = (operator, operator.kernels, operator.products, operator.taps, operator.folded)
    whole = next(part for part in parts if type(part) is kind)
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    assert kind(**fields) == whole
    for name in fields:
        with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
            kind(**{key: value for key, value in fields.items() if key != name})


def test_what_is_inlined_says_what_it_holds() -> None:
    """Dense attention gathers whole contexts in f32 where it is no plugin."""
    scratch = OPERATORS["MlaAttention"].inlined_scratch
    assert scratch is not None and scratch(MODEL, STEP) == 0
    assert scratch(DENSE, dataclasses.replace(STEP, batch=4)) == 2 * scratch(DENSE, STEP) > 0


def named(operator: Operator) -> Iterator[str]:
    yield operator.body
    if operator.folded is not None:
        yield operator.folded.body
    if operator.kernels is not None:
        yield operator.kernels.launch


@pytest.mark.parametrize("op", OPERATORS)
def test_every_name_in_a_description_can_be_loaded(op: str) -> None:
    pytest.importorskip("onnx")
    for dotted in named(OPERATORS[op]):
        assert dotted.startswith(f"seekforge.plugins.{SPECS[op].torch_name}.")
        assert callable(load(dotted)) == (":" in dotted)


def test_an_operator_without_a_description_of_its_kernels_has_no_launch_module() -> None:
    for op in OPERATORS.keys() - KERNEL_FORMS.keys():
        assert not (PLUGINS / SPECS[op].torch_name / "launch.py").exists()


@pytest.mark.parametrize("op", OPERATORS)
def test_taps_and_folded_weights_name_tensors_of_the_contract(op: str) -> None:
    operator, spec = OPERATORS[op], SPECS[op]
    inputs, outputs = {arg.name for arg in spec.inputs}, {arg.name for arg in spec.outputs}
    assert operator.taps.inputs.keys() <= inputs and operator.taps.outputs.keys() <= outputs
    fp8_weights = {arg.name for arg in spec.inputs if arg.dtype == "fp8"}
    assert {f"{name}_scale" for name in fp8_weights} <= inputs
    assert bool(fp8_weights) == (operator.folded is not None) == (operator.inlined_weights is not None)


@pytest.mark.parametrize("absent", ["Dsa", "Mla"])
def test_names_of_taps_of_one_program_are_different(absent: str) -> None:
    """A program's attention is sparse or dense; what is alike in both has one name."""
    names = [
        name
        for op, operator in OPERATORS.items()
        if not op.startswith(absent)
        for name in (*operator.taps.inputs.values(), *operator.taps.outputs.values())
    ]
    assert len(names) == len(set(names))


def symbols(spec: OpSpec) -> set[str]:
    """Return the sizes and attributes that `bind` gives."""
    dims = {dim for arg in spec.all_inputs for dim in arg.shape if isinstance(dim, str)}
    return {dim for dim in dims if dim.removeprefix("*").isidentifier()} | {attr.name for attr in spec.attrs}


@pytest.mark.parametrize("op", KERNEL_FORMS)
def test_sizes_stand_under_symbols_of_the_contract_and_are_enough_for_scratch(op: str) -> None:
    form, module = KERNEL_FORMS[op], op_kernels(op)
    static = form.static_sizes(MODEL)
    assert set(module.STATICS) <= static.keys() <= symbols(SPECS[op])
    sharing = dataclasses.replace(MODEL, config=load_preset("glm5-tiny").config)
    calls = [call for model in (MODEL, sharing, DENSE) for call in form.step_sizes(model, STEP)]
    assert calls, "a step of one of them calls every operator"
    for call in calls:
        assert call.keys() <= symbols(SPECS[op]) - static.keys()
        assert all(module.workspace_bytes(static | call, sm) >= 0 for sm in SMS)


@pytest.mark.parametrize("op", KERNEL_FORMS)
def test_exceptions_are_of_kernels_that_there_are(op: str) -> None:
    form, nvfp4 = KERNEL_FORMS[op], replace(MODEL, nvfp4_experts=True)
    models = [(MODEL, sm) for sm in SMS] + [(nvfp4, sm) for sm in SMS if sm >= NVFP4_SM]
    variants = {(one.name, sm) for of, sm in models for one in op_kernels(op).variants(form.static_sizes(of), sm)}
    assert form.known_spills.keys() <= variants
    assert form.known_mma_sync.keys() <= variants


def test_groups_follow_from_the_contracts() -> None:
    assert FP8_OPS == ("BlockFp8Linear", "MoeExperts")
    assert CACHE_OPS == ("DsaCacheWrite", "DsaIndexer", "DsaAttention", "MlaCacheWrite", "MlaAttention")
    by_builds = [op for op, operator in OPERATORS.items() if not operator.in_programs]
    assert by_builds == [ADD_RMS_NORM_QUANTIZE, BF16_LINEAR]
    for op in FP8_OPS:
        assert OPERATORS[op].products is not None, "what precision is about multiplies"
    assert all(OPERATORS[op].taps != NO_TAPS for op in CACHE_OPS)


def literals(path: Path) -> Iterator[str]:
    """Yield the literals of a file that are an operator's name, with or without the domain."""
    names = re.compile(rf"(seekforge\.)?({'|'.join(OPERATORS)})")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and names.fullmatch(node.value):
            yield f"{path}:{node.lineno}: {node.value}"


def test_hardly_any_code_outside_an_operators_folder_names_it() -> None:
    """What has to know an operator reads its description; a new one needs no search for places."""
    sources = [path for root in ROOTS for path in root.rglob("*.py")]
    assert len(sources) > 100
    outside = [path for path in sources if path.parent.parent != PLUGINS or path.parent.name not in FOLDERS]
    named_outside = [line for path in outside for line in literals(path)]
    assert len(named_outside) <= 8, "\n".join(named_outside)
