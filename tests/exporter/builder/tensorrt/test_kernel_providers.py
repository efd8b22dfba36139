"""`build --kernels OP=PROVIDER`: what is refused, what a dry run says, and what an engine notes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.support import cuda_on_cpu
from tests.support.build_options import gpu_options

import seekforge
from seekforge.common.cli.console import Stages
from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.exporter.builder import kernel_choice
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import Inputs, check, open_inputs
from seekforge.exporter.builder.tensorrt.kernels import kernel_tasks
from seekforge.exporter.sizing.calls import Call
from seekforge.formats.engine.manifest import load_manifest, rebuild_command
from seekforge.formats.targets import load_target
from seekforge.plugins.cost.card import card_of
from seekforge.plugins.cost.work import Load
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import Descriptors
from seekforge.plugins.kernels.kernel_set import read_kernels
from seekforge.plugins.kernels.providers import library, nvcc
from seekforge.plugins.registry import WITH_KERNELS
from seekforge.runtime.cli.main import main

SIZES = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True, "scale": 2.5, "T": 4}
CARD, LOAD = card_of(load_target("h200")), Load(context=4096, num_experts=256)


@pytest.fixture
def one_layer(tiny_layers: dict[str, Path], tiny_checkpoint: Path) -> Inputs:
    """The first MoE layer alone."""
    return open_inputs(tiny_layers["fp8"], tiny_checkpoint)


def tasks(inputs: Inputs, *providers: str, plugins: Sequence[str] = WITH_KERNELS, dry: bool = False) -> dict[str, str]:
    """Return op_type -> provider of what would be compiled."""
    known = [op for op in plugins if op in {"MoeRoute", "MoeExperts"}]
    work = kernel_tasks(inputs.program, inputs.config, load_target("rtx4090"), known, providers, dry=dry)
    return {task.op: task.provider for task in work}


def test_a_provider_is_compiled_for_its_operator_alone(one_layer: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "set_digest", lambda op, statics, provider: provider)
    monkeypatch.setattr(aot, "compiler", lambda: "triton")
    assert tasks(one_layer) == {"MoeRoute": "triton", "MoeExperts": "triton"}
    assert tasks(one_layer, "MoeRoute=flashinfer") == {"MoeRoute": "flashinfer", "MoeExperts": "triton"}
    assert tasks(one_layer, "auto", dry=True)["MoeRoute"] == "triton", "a dry run compiles nothing to compare"
    with pytest.raises(TargetError, match="--kernels MoeRoute=flashinfer: MoeRoute is no plugin of this engine"):
        tasks(one_layer, "MoeRoute=flashinfer", plugins=("MoeExperts",))


def test_a_dry_run_names_the_missing_library(
    tiny_layers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.find.cache_clear()
    monkeypatch.setattr(library, "installed", lambda package: None)
    monkeypatch.setattr(aot, "compiler", lambda: "triton")
    command = ["build", str(tiny_layers["fp8"]), str(tmp_path / "x"), "--target", "rtx4090", "--dry-run", "--json"]
    result = CliRunner().invoke(main, [*command, "--kernels", "MoeRoute=flashinfer"])
    assert result.exit_code == 0, result.stderr
    (missing,) = [one for one in json.loads(result.stdout)["missing"] if "flashinfer" in one]
    assert missing.startswith("flashinfer-python is not installed, and kernels of provider flashinfer include its head")
    keywords: dict[str, Any] = {"target": "rtx4090", "dry_run": True}
    for kernels in ({"MoeRoute": "flashinfer"}, "MoeRoute=flashinfer", ["MoeRoute=flashinfer"]):
        planned = seekforge.build(tiny_layers["fp8"], tmp_path / "x", kernels=kernels, **keywords)
        assert missing in (planned.missing or ())
    with pytest.raises(seekforge.OptionError, match="no kernels of provider 'cutlass'"):
        seekforge.build(tiny_layers["fp8"], tmp_path / "x", kernels={"MoeRoute": "cutlass"}, **keywords)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kernels", "MoeRoute=cutlass"), "MoeRoute has no kernels of provider 'cutlass'; it has triton, flashinfer"),
        (("--kernels", "MoeRoute"), "'MoeRoute' is no choice of kernels"),
        (("--kernels", "auto", "--no-kernels"), "--kernels and --no-kernels exclude each other"),
        (("--kernels",), "requires an argument"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["build", str(tmp_path), str(tmp_path / "x"), "--target", "rtx4090", *arguments])
    assert result.exit_code == 2 and words in result.stderr.strip().splitlines()[-1]


def test_a_cpu_takes_no_provider(tiny_layers: dict[str, Path], tmp_path: Path) -> None:
    command = ["build", str(tiny_layers["fp8"]), str(tmp_path / "x"), "--target", "cpu", "--kernels", "auto"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "--kernels is for GPU targets" in result.stderr


# --- the cost model's choice ------------------------------------------------------------------------------------


def settled(choice: str, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, **changed: int) -> dict[str, str]:
    monkeypatch.setattr(kernel_choice, "_seconds", lambda calls, provider, *rest, **options: seconds[provider])
    calls = [Call("MoeRoute", "", SIZES | changed, 3)]
    return kernel_choice.settle({"MoeRoute": choice}, calls, CARD, LOAD, cache=Path("unused"))


@pytest.mark.parametrize(("theirs", "chosen"), [(1.0, "flashinfer"), (2.0, "triton"), (3.0, "triton")])
def test_the_quickest_is_chosen_and_triton_where_none_is_quicker(
    theirs: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "compiler_of", lambda op, provider: provider)
    assert settled("auto", {"triton": 2.0, "flashinfer": theirs}, monkeypatch) == {"MoeRoute": chosen}


def test_who_is_missing_or_has_no_such_kernels_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"triton": 2.0, "flashinfer": 1.0}
    monkeypatch.setattr(aot, "compiler_of", lambda op, provider: provider)
    assert settled("auto", seconds, monkeypatch, E=1024) == {"MoeRoute": "triton"}
    with pytest.raises(TargetError, match=r"^MoeRoute=flashinfer: .*n_routed_experts is 1024, kernels take"):
        settled("flashinfer", seconds, monkeypatch, E=1024)

    def missing(op: str, provider: str) -> str:
        raise EnvironmentFault("not installed")

    monkeypatch.setattr(aot, "compiler_of", missing)
    assert settled("auto", seconds, monkeypatch) == {"MoeRoute": "triton"}


# --- an engine ---------------------------------------------------------------------------------------------------


def _missing() -> str:
    try:
        library.find("flashinfer")
        nvcc.find("flashinfer")
    except EnvironmentFault as error:
        return str(error)
    return "" if cuda_on_cpu.compiler() else "no C++ compiler is installed"


@pytest.mark.slow
@pytest.mark.skipif(bool(_missing()), reason=_missing())
def test_an_engine_has_the_librarys_kernels_and_says_so(one_layer: Inputs, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    target = load_target("rtx4090")
    target = target.model_copy(update={"profiles": {"decode": target.profiles["decode"]}})
    options = gpu_options(providers=("MoeRoute=flashinfer",))
    engine = tmp_path / "engine"
    checked = check(one_layer, target, options)
    build_gpu(one_layer, checked, engine, options=options, force=False, progress=Stages(quiet=True))
    manifest = load_manifest(engine)
    use = manifest.plugins["MoeRoute"]
    assert use.kernel_source.startswith("nvcc ") and " with flashinfer-python " in use.kernel_source
    assert {one.kernel_source.split()[0] for op, one in manifest.plugins.items() if op != "MoeRoute"} == {"triton"}
    kernels = read_kernels(Descriptors(engine, 89).find("MoeRoute", use.kernel_digest))
    assert (kernels.provider, set(kernels.images), kernels.compiler) == (
        "flashinfer",
        {"flashinfer"},
        use.kernel_source,
    )
    assert "--kernels MoeRoute=flashinfer" in rebuild_command(engine, manifest)
    page = CliRunner().invoke(main, ["inspect", str(engine)], catch_exceptions=False).stdout
    assert f"kernels by {use.kernel_source}: MoeRoute" in page.replace("\n", " ")
    (quickest,) = kernel_tasks(one_layer.program, one_layer.config, target, ["MoeRoute"], ["auto"])
    assert quickest.provider in ("triton", "flashinfer"), "both are compiled and compared"
