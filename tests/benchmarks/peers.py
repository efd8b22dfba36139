"""What others measured of their kernels, beside the cost model: a script, not a test.

`python -m tests.benchmarks.peers [--source FILE] [--json]` compiles the block FP8 product of SGLang and vLLM, a Triton
kernel that both have, as kernels of ours are compiled, and estimates it for the tiles and shapes of published times. It
needs the kernel's source, by default that of an installed SGLang (`pip install --no-deps sglang`), which is read and
never imported; the one function is taken from it. No GPU is needed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.formats.targets import load_target
from seekforge.plugins.cost import model
from seekforge.plugins.cost.card import Card, card_of
from seekforge.plugins.cost.work import Work
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.kernel_set import Resources
from seekforge.plugins.kernels.providers.images import inspect_cubin
from seekforge.plugins.kernels.sm_limits import occupancy
from seekforge.plugins.operator import cdiv

#: The kernel, and where SGLang 0.5.23 has it below its package.
KERNEL: Final = "_w8a8_block_fp8_matmul"
SOURCE: Final = "kernels/ops/gemm/fp8_kernel.py"
SM, BLOCK = 90, 128


@dataclass(frozen=True)
class Tile:
    """How a product was cut: rows and columns of a tile, warps, stages of the load pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Point:
    """A published time of [m, k] · [n, k]ᵀ.

    Attributes:
        target: the target with the GPU.
        m, n, k: sizes.
        tile: how it was cut.
        published_us: microseconds.
    """

    target: str
    m: int
    n: int
    k: int
    tile: Tile
    published_us: float


def points() -> Iterator[Point]:
    """Yield what was published.

    Sources: vLLM PR 23280 (2025-09-10, H100, replayed as a CUDA graph, TFLOPS), tiles of vLLM's own file for this GPU
    and weight at 4e08f87e; SGLang PR 3893 (2025-02-26, H200, microseconds, not in a graph: those of 1,024 rows and
    more, which hide that), tiles of SGLang 0.5.23, which may be others than were measured.
    """
    n, k = 2112, 7168
    for m, tflops, tile in (
        (1, 1.298436, Tile(16, 32, 4, 5)),
        (16, 20.755163, Tile(16, 32, 4, 3)),
        (64, 63.663467, Tile(16, 64, 4, 5)),
        (128, 118.310905, Tile(64, 64, 4, 3)),
        (256, 219.266445, Tile(64, 64, 4, 4)),
        (512, 305.159322, Tile(128, 64, 4, 5)),
        (1024, 366.839772, Tile(256, 64, 8, 5)),
        (2048, 396.032348, Tile(128, 64, 4, 4)),
        (4096, 402.982983, Tile(128, 64, 4, 4)),
        (8192, 406.511360, Tile(128, 64, 4, 4)),
    ):
        yield Point("h100", m, n, k, tile, 2 * m * n * k / tflops / 1e6)
    small, wide = Tile(64, 64, 4, 3), Tile(64, 128, 4, 3)
    for m, n, k, tile, us in (
        (1024, 1536, 7168, small, 101.184003),
        (2048, 1536, 7168, small, 176.128000),
        (4096, 1536, 7168, wide, 295.008004),
        (1024, 2304, 7168, small, 151.232004),
        (2048, 2304, 7168, small, 249.311998),
        (4096, 2304, 7168, wide, 463.679999),
        (2048, 24576, 7168, wide, 2157.599926),
        (4096, 24576, 7168, wide, 4067.296028),
        (1024, 32768, 512, wide, 154.783994),
        (2048, 32768, 512, wide, 275.712013),
        (4096, 32768, 512, wide, 513.504028),
    ):
        yield Point("h200", m, n, k, tile, us)


def product_work(point: Point) -> Work:
    """Return what the kernel does at a point: its programs read rows and columns of tiles whole."""
    m, n, k, tile = point.m, point.n, point.k, point.tile
    programs = cdiv(m, tile.rows) * cdiv(n, tile.columns)
    scales = 4 * cdiv(k, BLOCK) * (m + cdiv(n, BLOCK))
    return Work(
        read_bytes=(m + n) * k + scales,
        written_bytes=2 * m * n,
        loaded_bytes=programs * (tile.rows + tile.columns) * k,
        programs=programs,
        flops=2 * m * n * k,
        pass_flops=2 * tile.rows * tile.columns * BLOCK,
        products="fp8",
        passes=(cdiv(k, BLOCK),),
    )


def extracted(source: str, name: str) -> str:
    """Return a module that has one function of `source` and what Triton needs beside it.

    Raises:
        SystemExit: there is no such function, or the source is no Python.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        sys.exit(f"the source is no Python: {error}; SGLang 0.5.23 has {name} in {SOURCE}")
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name and node.decorator_list:
            lines = source.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno]
            return "\n".join(["import triton", "import triton.language as tl", "", "", *lines, ""])
    sys.exit(f"no function {name} in the source; SGLang 0.5.23 has it in {SOURCE}")


def compiled(function: Any, point: Point, folder: Path) -> model.Kernel:
    """Compile the kernel for a point: sizes and strides that Triton would specialize are constants or multiples."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile, blocks = point.tile, cdiv(point.k, BLOCK)
    sizes = {"M": point.m, "N": point.n, "K": point.k, "stride_am": point.k, "stride_bn": point.k}
    sizes |= {"stride_cm": point.n, "stride_As_m": blocks, "stride_Bs_n": blocks}
    pointers = {"A": "*fp8e4nv", "B": "*fp8e4nv", "C": "*bf16", "As": "*fp32", "Bs": "*fp32"}
    types = pointers | {name: "i32" for name, value in sizes.items() if value != 1}
    constants = dict.fromkeys(("stride_ak", "stride_bk", "stride_cn", "stride_As_k", "stride_Bs_k"), 1)
    constants |= {name: 1 for name, value in sizes.items() if value == 1}
    constants |= {"group_n": BLOCK, "group_k": BLOCK, "BLOCK_SIZE_M": tile.rows, "BLOCK_SIZE_N": tile.columns}
    constants |= {"BLOCK_SIZE_K": BLOCK, "GROUP_SIZE_M": 16, "needs_masking": False}
    names = function.arg_names
    aligned = [name for name in types if name in pointers or sizes[name] % 16 == 0]
    source = ASTSource(
        function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", SM, 32), options=options)
    cubin = made.asm["cubin"]
    file = folder / f"{hashlib.sha256(cubin).hexdigest()[:32]}.cubin"
    file.write_bytes(cubin)
    ((registers, stack, _),) = inspect_cubin(cubin)[1].values()
    held = {"registers": registers, "shared_bytes": made.metadata.shared, "tensor_columns": 0}
    resident = occupancy(**held, num_warps=tile.num_warps, sm=SM)
    used = Resources(**held, stack_bytes=stack, occupancy=resident)
    return model.Kernel(used, tile.num_warps, tile.num_stages, aot.read_code(file, cache=folder))


def row(point: Point, kernel: model.Kernel, card: Card) -> dict[str, Any]:
    """Return a point as published and as the model has it, in microseconds, and the ratios of both."""
    found = model.estimate(product_work(point), kernel, card)
    us, in_turn = found.seconds * 1e6, found.seconds_in_turn * 1e6
    return {
        "target": point.target,
        "m": point.m,
        "n": point.n,
        "k": point.k,
        "programs_per_sm": min(found.blocks_per_sm, cdiv(product_work(point).programs, card.num_sms)),
        "published_us": round(point.published_us, 1),
        "us": round(us, 1),
        "us_in_turn": round(in_turn, 1),
        "ratio": round(point.published_us / us, 2),
        "ratio_in_turn": round(point.published_us / in_turn, 2),
    }


def mean_ratio(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Return the geometric mean of a ratio."""
    return math.exp(sum(math.log(one[key]) for one in rows) / len(rows))


def _source(given: Path | None) -> str:
    if given is None:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("sglang is not installed; pip install --no-deps sglang==0.5.23, or give --source FILE")
        given = Path(spec.submodule_search_locations[0]) / SOURCE
    try:
        return given.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{given}: cannot be read ({error}); give --source FILE with {KERNEL}")


def main() -> None:
    """Print a row for each point, and the means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", type=Path, help=f"file with {KERNEL}")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    module = extracted(_source(arguments.source), KERNEL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "peer.py"
        file.write_text(module, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("peer", file)
        assert spec is not None and spec.loader is not None
        peer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(peer)
        cards = {target: card_of(load_target(target)) for target in ("h100", "h200")}
        function = getattr(peer, KERNEL)
        rows = [row(point, compiled(function, point, folder), cards[point.target]) for point in points()]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| GPU | m | n × k | programs of an SM | published | model | in turn | ratio | in turn |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in rows:
        cells = one["target"], one["m"], f"{one['n']} × {one['k']}", one["programs_per_sm"], one["published_us"]
        cells += one["us"], one["us_in_turn"], one["ratio"], one["ratio_in_turn"]
        print(f"| {' | '.join(map(str, cells))} |")
    for target in cards:
        of = [one for one in rows if one["target"] == target]
        print(f"{target}: {mean_ratio(of, 'ratio'):.2f}, in turn {mean_ratio(of, 'ratio_in_turn'):.2f}")


if __name__ == "__main__":
    main()
