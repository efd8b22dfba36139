"""What launches of `DsaIndexer` move and compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seekforge.formats.paged_cache import index_row_bytes
from seekforge.plugins.cost.work import Load, Work, visible_keys
from seekforge.plugins.dsa_indexer.launch import (
    ADDED_PROGRAMS,
    DIGIT_COUNTS,
    LAST_COUNTS,
    SELECT_BLOCK,
    rows_per_program,
)
from seekforge.plugins.kernels.launch_plan import Launch
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.operator import cdiv

#: Keys of one page, and passes over the scores of a row: three histograms, and the one that writes positions.
_PAGE, _PASSES = 64, 4


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what the scores or the selection of one slice of rows does."""
    q, topk = bound["Q"], bound["index_topk"]
    visible, first = visible_keys(load, q), int(launch.arguments["first_row"])  # pyright: ignore[reportArgumentType]
    if not launch.variant.startswith("scores"):
        seen = [visible[row % q] for row in range(first, first + launch.grid[0])]
        return _selection(seen, topk) if launch.variant == "select" else _shared_selection(launch, seen, topk)
    last = int(launch.arguments["last_row"])  # pyright: ignore[reportArgumentType]
    scored = [visible[row % q] if visible[row % q] > topk else 0 for row in range(first, last)]
    group, pages = rows_per_program(q, sm), int(launch.arguments["pages"])  # pyright: ignore[reportArgumentType]
    longest: dict[tuple[int, int], int] = {}  # (sequence, group of rows) -> most keys that one of its rows needs
    keys: dict[int, int] = {}  # sequence -> the same
    for row, seen in zip(range(first, last), scored, strict=True):
        place = row // q, row % q // group
        longest[place] = max(longest.get(place, 0), seen)
        keys[row // q] = max(keys.get(row // q, 0), seen)
    heads, dim = bound["Hi"], bound["D"]
    key_bytes = index_row_bytes(dim, bound["index_format"])
    query_bytes = heads * (2 * dim + 4)
    programs = sum(cdiv(cdiv(most, _PAGE), pages) for most in longest.values())
    read_pages = sum(cdiv(most, _PAGE) for most in longest.values())
    return Work(
        read_bytes=sum(keys.values()) * key_bytes + sum(map(bool, scored)) * query_bytes,
        written_bytes=4 * sum(scored) + 4 * int(launch.arguments["num_counts"]) * (last - first),  # pyright: ignore[reportArgumentType]
        loaded_bytes=read_pages * _PAGE * key_bytes + programs * group * query_bytes,
        programs=programs,
        flops=2 * sum(scored) * heads * dim,
        pass_flops=2 * _PAGE * group * heads * dim,
        products="fp8" if bound["indexer_fp8"] and bound["index_format"] == "fp8_ds" and has_fp8(sm) else "bf16",
        passes=(min(pages, cdiv(max(longest.values()), _PAGE)),),
    )


def _selection(seen: list[int], topk: int) -> Work:
    """Return what choosing among the scores of rows does; one that takes all its keys reads none."""
    scored = [keys for keys in seen if keys > topk]
    blocks = cdiv(max(scored, default=0), SELECT_BLOCK)
    whole = cdiv(topk, SELECT_BLOCK) if len(scored) < len(seen) else 0
    return Work(
        read_bytes=4 * sum(scored) + 8 * len(seen),
        written_bytes=4 * topk * len(seen),
        loaded_bytes=_PASSES * 4 * sum(scored),
        programs=len(seen),
        passes=(*(blocks,) * _PASSES, whole),
    )


def _shared_selection(launch: Launch, seen: list[int], topk: int) -> Work:
    """Return what programs that share rows do in one of the launches of a selection."""
    span, level = int(launch.arguments["span"]), launch.variant.partition("-")[2]  # pyright: ignore[reportArgumentType]
    scored = [keys for keys in seen if keys > topk]
    programs = sum(cdiv(keys, span) for keys in scored)
    most = max(scored, default=0)
    steps, row_counts = cdiv(min(span, most), SELECT_BLOCK), 4 * DIGIT_COUNTS * len(scored)
    program_counts = 4 * (LAST_COUNTS + 1) * programs
    scores = 4 * sum(scored)
    if level:  # a digit: programs read the sums of the digit before, and add to those of this one
        read = 0 if level == "0" else row_counts
        written = program_counts if level == "2" else row_counts
        return Work(
            read_bytes=scores + read + 8 * len(seen),
            # digit 0 clears the sums of the next one
            written_bytes=written + (row_counts if level == "0" else 0),
            loaded_bytes=scores + (4 * DIGIT_COUNTS * programs if read else 0),
            programs=programs,
            passes=(steps,),
        )
    whole = len(seen) - len(scored)
    sharing = cdiv(most, span)
    return Work(
        read_bytes=scores + program_counts + 8 * len(seen),
        written_bytes=4 * topk * len(seen),
        loaded_bytes=scores + sum(4 * (LAST_COUNTS + 1) * cdiv(keys, span) ** 2 for keys in scored),
        programs=programs + whole,
        passes=(cdiv(sharing, ADDED_PROGRAMS), steps, cdiv(topk, SELECT_BLOCK) if whole else 0),
    )
