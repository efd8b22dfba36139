"""What is refused before a GPU engine is built, and what is said of it: nothing here compiles."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.build_options import gpu_options

from seekforge.common.dtypes import itemsize
from seekforge.common.errors import ProgramError, SeekforgeError, TargetError
from seekforge.exporter.builder.cli import build as build_command
from seekforge.exporter.builder.options import BuildOptions
from seekforge.exporter.builder.tensorrt.check import Inputs, check, open_inputs
from seekforge.exporter.builder.tensorrt.memory import expected_bytes, layers_that_fit
from seekforge.formats.program import load_program
from seekforge.formats.targets import load_target
from seekforge.plugins.registry import SPECS

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ((), gpu_options(plugins="none"), "--precision fp8 needs BlockFp8Linear and MoeExperts as plugin"),
        (("precision=bf16",), gpu_options(plugins="none"), "fp8_ds is read and written by plugins only"),
        (("limits.max_model_len=1000000",), gpu_options(), "--max-model-len is 1000000, expected 1 to 163840"),
        (("limits.max_model_len=0",), gpu_options(), "--max-model-len is 0, expected 1 to 163840"),
        (("limits.max_batch_size=4096",), gpu_options(), "pass --max-num-batched-tokens 4096 too"),
        (("gpu.memory_gib=2.05",), gpu_options(), r"needs 2\.\d GiB.*pass --max-model-len \d+ at most"),
        (("gpu.memory_gib=1",), gpu_options(), "of it .* of weights; not one layer fits"),
    ],
)
def test_refusals(inputs: Inputs, settings: tuple[str, ...], options: BuildOptions, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        check(inputs, load_target("rtx4090", settings), replace(options, settings=settings))


def test_the_number_that_would_work_works(inputs: Inputs) -> None:
    small = ["gpu.memory_gib=2.05"]
    with pytest.raises(TargetError) as caught:
        check(inputs, load_target("rtx4090", small), gpu_options())
    fits = str(caught.value).partition("--max-model-len ")[2].partition(" ")[0]
    planned = check(inputs, load_target("rtx4090", [*small, f"limits.max_model_len={fits}"]), gpu_options())
    assert not planned.oversize


def test_layers_that_fit_count_what_the_ends_hold_beside_them(inputs: Inputs) -> None:
    """The first stage embeds tokens, the last one has the head and the MTP module: a mean says too much of both."""
    sizes: dict[str, int] = {}
    for graph, graph_io in inputs.program.graphs.items():
        for spec in (*graph_io.with_role("weight"), *graph_io.with_role("table")):
            dtype = "f32" if spec.name in inputs.wide(SPECS)[graph] else spec.dtype
            sizes[spec.name] = itemsize(dtype) * math.prod(map(int, spec.shape))
    tables = tuple(spec.name for spec in inputs.program.graphs["model"].with_role("table"))
    behind = tuple(name for name in sizes if not name.startswith(("layers.0.", "layers.1.", "layers.2.", *tables)))
    cache = 1000  # of one layer

    def held(first: int, stop: int) -> int:
        """Bytes of the stage [first, stop)."""
        names = tuple(f"layers.{layer}." for layer in range(first, stop)) + tables
        names += behind if stop == 4 else ("embed_tokens.",) if first == 0 else ()
        return sum(size for name, size in sizes.items() if name.startswith(names)) + cache * (
            stop - first + (stop == 4)
        )

    stages = {
        (first, stop): held(first, stop) for first in range(4) for stop in range(first + 1, 5) if stop - first < 4
    }
    assert len(set(stages.values())) > 4, "stages differ"
    for budget in (size - fewer for size in stages.values() for fewer in (0, 1)):
        expected = max((stop - first for (first, stop), size in stages.items() if size <= budget), default=0)
        assert layers_that_fit(inputs, budget, 5 * cache) == expected
    small = ["limits.max_model_len=64"]
    device = expected_bytes(inputs, load_target("rtx4090", small), load_target("rtx4090", small).limits, 1)
    there = device["total"] - device["weights"] - device["cache"] + device["cache"] + stages[1, 3]
    with pytest.raises(TargetError, match="; at most 2 of its 4 layers fit: export stages with --layers"):
        check(inputs, load_target("rtx4090", [*small, f"gpu.memory_gib={there / 0.98 / 2**30}"]), gpu_options())


def test_oversize_is_built_only_when_asked(inputs: Inputs) -> None:
    planned = check(inputs, load_target("rtx4090", ["gpu.memory_gib=1"]), gpu_options(allow_oversize=True))
    assert planned.oversize


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "--precision fp8 multiplies quantized activations.*export with --numerics fp8"),
        (("precision=bf16",), "--kv-cache-dtype fp8_ds stores FP8.*export with --numerics fp8"),
    ],
)
def test_the_program_must_carry_what_is_asked(
    tiny_programs: dict[str, Path], settings: tuple[str, ...], message: str
) -> None:
    exact = open_inputs(tiny_programs["exact"], None)
    with pytest.raises(TargetError, match=message):
        check(exact, load_target("rtx4090", settings), gpu_options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_n_heads": 48}, "DsaIndexer: index_n_heads is 48, kernels take 16, 32 or 64"),
        (
            {"num_experts_per_tok": 22, "n_routed_experts": 64},
            "MoeRoute: num_experts_per_tok is 22, kernels take 1 to 16",
        ),
        ({"n_routed_experts": 2048}, "MoeRoute: n_routed_experts is 2048, kernels take a power of two from 16 to 1024"),
        ({"kv_lora_rank": 384}, "DsaCacheWrite: kv_lora_rank is 384, kernels take 128, 256, 512 or 1024"),
    ],
)
def test_an_operator_refuses_sizes_it_cannot_do(inputs: Inputs, change: dict[str, int], message: str) -> None:
    bent = replace(inputs, config=inputs.config.model_copy(update=change))
    with pytest.raises(TargetError, match=message):
        check(bent, load_target("rtx4090"), gpu_options(plugins="all"))


def test_auto_inlines_what_has_no_plugin(inputs: Inputs) -> None:
    config = inputs.config.model_copy(update={"n_routed_experts": 160, "n_group": 8})
    bent = replace(inputs, config=config)
    planned = check(bent, load_target("rtx4090"), gpu_options())
    assert planned.inlined == ("MoeRoute",)


def test_a_checkpoint_of_another_model_is_refused(inputs: Inputs, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"index_topk": 8}))
    with pytest.raises(ProgramError, match="index_topk is 8, the program was exported for"):
        open_inputs(inputs.folder, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu"], "pass --checkpoint"),
        (["--target", "cpu", "--precision", "fp8"], "precision fp8 is for GPUs; a CPU knows f32, int8, int4"),
        (["--target", "cpu", "--sm", "89"], "--sm is for GPU targets"),
        (["--target", "rtx4090", "--timing-cache", "x"], "--timing-cache is for tensorrt"),
        (["--target", "rtx4090", "--sm", "90"], "sm 90 is not one that tensorrt-rtx compiles for"),
        (["--target", "rtx4090", "--taps", "--layers-per-engine", "2"], "leave out --layers-per-engine"),
    ],
)
def test_options_that_a_target_does_not_know(
    tiny_programs: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(build_command, [str(tiny_programs["fp8"]), str(tmp_path / "x"), *arguments])
    assert isinstance(result.exception, SeekforgeError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_is_a_number_of_bytes(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(tiny_programs["fp8"]), str(tmp_path / "x"), "--target", "rtx4090", "--workspace", "big"]
    result = CliRunner().invoke(build_command, arguments)
    assert result.exit_code == 2
    assert "'--workspace': 'big' is no number of bytes, such as 512M or 2G" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_it_would_build_and_builds_nothing(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(tiny_programs["fp8"]), str(tmp_path / "x"), "--target", "rtx5090", "--dry-run", "--json"]
    result = CliRunner().invoke(build_command, arguments)
    said = json.loads(result.stdout)
    assert said["plugins"].keys() == {*load_program(tiny_programs["fp8"]).ops, "AddRmsNormQuantize", "Bf16Linear"}
    assert said["sms"] == [120]
    assert list(tmp_path.iterdir()) == []
