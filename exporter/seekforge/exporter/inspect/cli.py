"""`seekforge inspect`: what a checkpoint, a program or an engine is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.filesize import decimal

from seekforge.common.cli.console import Column, Console, Table, console, styled
from seekforge.common.cli.options import command, json_option
from seekforge.common.cli.terminal import write, write_json
from seekforge.common.errors import ProgramError
from seekforge.common.requirements import install_module
from seekforge.exporter.builder.audit_page import quality_words, self_check_words, show_audit
from seekforge.exporter.builder.request import read_graph
from seekforge.exporter.checkpoint.source import headers, parse_repo
from seekforge.exporter.inspect.describe import describe, kind_of
from seekforge.exporter.program.cli import error_sentences
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import load_program

if TYPE_CHECKING:
    from seekforge.exporter.inspect.draw import Format


@command(
    "inspect",
    examples=(
        "seekforge inspect checkpoint",
        "seekforge inspect engine --json",
        "seekforge inspect program --graph dot | dot -Tsvg > program.svg",
    ),
)
@click.argument("path")
@json_option
@click.option(
    "--graph",
    type=click.Choice(["dot", "mermaid"]),
    default=None,
    help="Print a program's graph instead: one box per operator, equal layers once.",
)
@click.option("--mtp", is_flag=True, help="With --graph: the MTP module instead of the main model.")
def inspect(path: str, *, as_json: bool, graph: Format | None, mtp: bool) -> None:
    """Show what PATH is: a checkpoint (folder, or Hugging Face repository, of which headers are read), a program or an
    engine.
    """
    with headers(path) as folder:
        if graph is not None:
            write(_drawing(folder, graph, "mtp" if mtp else "model"))
            return
        repo = parse_repo(path)
        about = describe(folder) | ({} if repo is None else {"path": str(repo)})
    if as_json:
        write_json(about)
    else:
        show(about, console())


def _drawing(path: Path, how: Format, name: str) -> str:
    if kind_of(path) != "program":
        raise ProgramError(f"{path}: is a {kind_of(path)}, --graph draws programs; pass a folder that 'export' wrote")
    program = load_program(path)
    if name not in program.graphs:
        raise ProgramError(f"{path}: has no {name} graph, only {', '.join(program.graphs)}")
    from seekforge.exporter.inspect.draw import draw, groups  # needs onnx, which a look at an engine does not

    graph = program.graphs[name]
    weights = {spec.name for spec in graph.inputs if spec.role in ("weight", "table")}
    return draw(groups(read_graph(path, graph), weights), how)


def show(about: dict[str, Any], out: Console) -> None:
    """Print what `describe` found as a few tables."""
    model, counts = about["model"], about["parameters"]
    out.print(styled((about["kind"], "bold"), f" {about['path']}"))
    out.print(
        f"{model['model_type']}: {model['num_hidden_layers']} layers ({model['num_dense_layers']} dense), "
        f"{model['n_routed_experts']} experts of which {model['num_experts_per_tok']} are used, hidden "
        f"{model['hidden_size']}, {'with' if model['has_mtp'] else 'without'} MTP"
    )
    out.print(
        f"parameters: {counts['stored']:,} stored, {counts['main']:,} in the main model, {counts['active']:,} active "
        f"per token, {counts['mtp']:,} of MTP"
    )
    if about["kind"] == "checkpoint":
        _show_checkpoint(about, out)
        return
    first, stop = about["layers"]
    out.print(f"layers {first}-{stop - 1}, numerics {about['numerics']}, seekforge {about['seekforge_version']}")
    if about["kind"] == "engine":
        target, limits = about["target"], about["limits"]
        out.print(
            f"target {target['name']} ({target['backend']}), up to {limits['max_model_len']:,} tokens, "
            f"{decimal(about['num_bytes'])} in {len(about['files'])} files"
        )
        manifest = load_manifest(Path(about["path"]))
        out.print(f"self-check: {self_check_words(manifest)}")
        if manifest.quality is not None:
            out.print(f"quality: {quality_words(manifest.quality)}")
        how = about["quantization"]
        if how is not None:
            kinds = {
                name: ", ".join(kind for kind, stored in how["kinds"].items() if stored == name)
                for name in dict.fromkeys(how["kinds"].values())
            }
            stored = "; ".join(f"{name} {listed}" for name, listed in kinds.items())
            out.print(f"weights: {stored}; blocks of {how['block_size']}")
            for name, one in how["weights"].items():
                out.print(f"  but {one} {name}")
        show_audit(manifest, out)
    else:
        ranks = about["ranks"]
        parallelism = Parallelism.model_validate(ranks["parallelism"])
        if parallelism.num_ranks > 1:
            least, most = (decimal(extreme(ranks["bytes_read"])) for extreme in (min, max))
            out.print(
                f"of each of {parallelism.num_ranks} ranks ({parallelism}), which read {least} to {most} of the "
                "checkpoint each"
            )
        if about["outside"]:
            out.print(f"{sum(about['outside'].values()):,} tensors of the checkpoint lie outside these layers")
    for name, graph in about["graphs"].items():
        out.print("")
        out.print(styled((name, "bold"), f": {_files(name, graph, about)}"))
        _show_graph(graph, out)


def _show_checkpoint(about: dict[str, Any], out: Console) -> None:
    for note in about["notes"]:
        out.print(f"note: {note}")
    out.print(f"{about['num_tensors']:,} tensors, {decimal(about['num_bytes'])} in {about['num_shards']} shards")
    out.print(f"weights: {about['weights']}")
    for line in about["engines"]:
        out.print(f"engines for {line}")
    for line in error_sentences(about["quantization_errors"]):
        out.print(line)
    table = Table([Column("dtype"), *(Column(name, "number") for name in ("tensors", "elements", "bytes"))])
    for dtype, entry in about["dtypes"].items():
        table.add(dtype, f"{entry['tensors']:,}", f"{entry['elements']:,}", decimal(entry["bytes"]))
    out.print(table)
    table = Table([Column("family"), Column("bytes", "number")])
    for family, size in about["bytes_by_family"].items():
        table.add(family, decimal(size))
    out.print(table)


def _files(name: str, graph: dict[str, Any], about: dict[str, Any]) -> str:
    """Say which file a graph is, or by which plans an engine runs its stages."""
    stages = Counter(about.get("stages", {}).get(name, []))
    if not stages:
        return f"{graph['file']}, {'missing' if graph['file_bytes'] is None else decimal(graph['file_bytes'])}"
    plans = [f"{file} {count} times" if count > 1 else file for file, count in stages.items()]
    size = sum(about["files"].get(file, 0) for file in stages)
    return f"a step runs {stages.total()} stages by {len(stages)} plans, {decimal(size)}: {', '.join(plans)}"


def _show_graph(graph: dict[str, Any], out: Console) -> None:
    if graph["num_weight_inputs"]:
        kinds = ", ".join(f"{decimal(n)} {dtype}" for dtype, n in graph["weight_bytes_by_dtype"].items())
        out.print(f"{graph['num_weight_inputs']:,} weight inputs, {decimal(graph['weight_bytes'])}: {kinds}")
    if graph["op_counts"]:
        custom = {op.removeprefix("seekforge."): n for op, n in graph["op_counts"].items() if "." in op}
        total = sum(graph["op_counts"].values())
        out.print(f"{total:,} nodes; custom: {', '.join(f'{n} {op}' for op, n in custom.items()) or 'none'}")
    elif graph["file"].endswith(".onnx"):
        out.print(f"nodes are counted with onnx, which is not here: {install_module('onnx')}")
    table = Table([Column("", "code"), Column("name"), Column("dtype", "code"), Column("shape")])
    for kind in ("inputs", "outputs"):
        for (prefix, dtype, shape), names in _collapsed(graph[kind]).items():
            label = prefix if len(names) == 1 else f"{prefix}.{{{names[0]}..{names[-1]}}}"
            table.add(kind[:-1], label, dtype, shape)
    out.print(table)


def _collapsed(specs: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[str]]:
    """Group what differs in its layer's number only."""
    result: dict[tuple[str, str, str], list[str]] = {}
    for spec in specs:
        prefix, _, layer = spec["name"].rpartition(".")
        key = (prefix if layer.isdigit() else spec["name"], spec["dtype"], str(spec["shape"]).replace("'", ""))
        result.setdefault(key, []).append(layer)
    return result
