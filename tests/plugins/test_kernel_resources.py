"""What kernels cost: no spill in a main loop without a reason, the record complete, the docs made from it."""

from __future__ import annotations

import json
from pathlib import Path

import kernels_doc
import pytest
from click.testing import CliRunner

from seekforge.exporter.build.kernels_cli import kernels
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.plugins.kernel_rules import KNOWN_SPILLS, unlisted_spills
from seekforge.plugins.kernel_sizes import WITH_KERNELS, operators
from seekforge.plugins.launch import SHARED_LIMIT, SMS, Image, KernelSet, Resources, op_kernels, statics_of
from seekforge.plugins.registry import SPECS

RECORD = kernels_doc.recorded()


def test_every_operator_has_kernels() -> None:
    assert set(SPECS) - set(WITH_KERNELS) <= {"SumRanks"}, "a collective is TensorRT's own layer"


def test_the_record_has_every_kernel_of_the_full_model_for_every_sm() -> None:
    wanted = set()
    for op, bound in operators(load_preset("full").config).items():
        for sm in SMS:
            wanted |= {(op, sm, variant.name) for variant in op_kernels(op).variants(statics_of(op, bound), sm)}
    assert {(one["op"], one["sm"], one["kernel"]) for one in RECORD} == wanted


def test_main_loops_do_not_spill_unless_listed() -> None:
    spilled = {
        (one["op"], one["kernel"], one["sm"]): one["spill_bytes"]
        for one in RECORD
        if one["main_loop"] and one["spill_bytes"]
    }
    assert spilled == {key: size for key, (size, _) in KNOWN_SPILLS.items()}
    assert all(len(reason) > 20 for _, reason in KNOWN_SPILLS.values())


def test_an_unlisted_spill_is_named() -> None:
    image = Image("loop", "loop", "", "", 4, 1, 0, 1, (), True, Resources(255, 16, 0, 0.1))
    found = unlisted_spills([KernelSet("MoeRoute", 1, 90, "", {}, "", {"loop": image})])
    assert found == ["MoeRoute loop sm90: 16 bytes of stack, 0 known"]


def test_every_kernel_fits_its_sm() -> None:
    for one in RECORD:
        assert one["shared_bytes"] <= SHARED_LIMIT[one["sm"]]
        assert one["occupancy"] > 0, f"{one['op']} {one['kernel']} sm{one['sm']} cannot be resident"


def test_the_tables_of_the_docs_are_up_to_date() -> None:
    page = (kernels_doc.DOCS / "kernels.md").read_text(encoding="utf-8")
    assert kernels_doc.updated(page) == page, "run: python tests/kernels_doc.py"


@pytest.mark.slow
def test_compiled_again_the_record_is_the_same_within_a_tenth(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="triton compiles the kernels; it exists for Linux only")
    if triton.__version__ != "3.9.0":
        pytest.skip(f"the record is of triton 3.9.0, this is {triton.__version__}")
    result = CliRunner().invoke(kernels, ["build", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    again = {(one["op"], one["sm"], one["kernel"]): one for one in json.loads(result.stdout)["kernels"]}
    for one in RECORD:
        found = again.pop((one["op"], one["sm"], one["kernel"]))
        assert found["spill_bytes"] == one["spill_bytes"]
        for key in ("registers", "shared_bytes"):
            assert abs(found[key] - one[key]) <= 0.1 * one[key]
    assert not again
