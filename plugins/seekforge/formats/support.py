"""What works with what, and how it was shown: model family × form of the checkpoint × target. The one list of it.

docs/index.md has it as a table (a test compares them), `seekforge doctor` and `seekforge inspect` show it, and builds
that are refused say what of it leads on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from seekforge.formats.weight_recipes.stored import WORDS, WeightForm

Backend = Literal["cpu", "gpu"]
#: A backend's targets, for people.
TARGETS: Final[dict[Backend, str]] = {"cpu": "cpu", "gpu": "GPUs"}


@dataclass(frozen=True)
class Support:
    """One row.

    Attributes:
        family: `model_type` of config.json.
        form: how the checkpoint holds its matrices.
        backend: what engines are for.
        numerics: those that programs may have for it; empty: it is refused.
        shown_by: what was done to show it, or why it is refused.
    """

    family: str
    form: WeightForm
    backend: Backend
    numerics: tuple[str, ...]
    shown_by: str

    @property
    def works(self) -> bool:
        """Whether such engines are built."""
        return bool(self.numerics)


_ALL: Final = ("fp8", "exact", "bf16")
_KEPT: Final = ("exact", "bf16")
_LAYERS: Final = "two layers against `transformers`"
_NO_GPU: Final = "refused: kernels multiply FP8 blocks"
_OTHER_FP8: Final[tuple[WeightForm, ...]] = ("ct_fp8_channel", "ct_fp8_tensor", "fp8_tensor")


def _rows() -> tuple[Support, ...]:
    rows: list[Support] = []
    for family, preset in _PRESETS.items():
        parity = f"`parity` against PyTorch and `transformers`, on `{preset}`"
        deep = f"{parity}: below, at and above `index_topk`" if family == "glm_moe_dsa" else parity
        rows += [
            Support(family, "fp8_blocks", "cpu", _ALL, deep),
            Support(family, "fp8_blocks", "gpu", _ALL, _RTX[family]),
            Support(family, "bf16", "cpu", _ALL, _BF16_CPU.format(preset)),
            Support(family, "bf16", "gpu", ("fp8",), f"`{preset}` built for an RTX 4090; never run"),
            Support(family, "ct_fp8_blocks", "cpu", _ALL, _LAYERS),
            Support(family, "ct_fp8_blocks", "gpu", ("fp8",), "programs as of FP8 blocks; never run"),
        ]
        for form in (*_OTHER_FP8, "nvfp4", "ct_nvfp4"):
            shown = _SHOWN.get((family, form), _LAYERS)
            rows += [Support(family, form, "cpu", _KEPT, shown), Support(family, form, "gpu", (), _NO_GPU)]
    return tuple(rows)


_PRESETS: Final = {"deepseek_v32": "tiny", "deepseek_v3": "tiny-v3", "glm_moe_dsa": "glm5-tiny"}
_BUILT: Final = "built for RTX cards"
_RTX: Final = {
    "deepseek_v32": f"`tiny` and all of `full` {_BUILT}; kernels in an interpreter; never run",
    "deepseek_v3": f"`tiny-v3` and all of `v3-full` {_BUILT}, caches in BF16; kernels in an interpreter; never run",
    "glm_moe_dsa": f"`glm5-tiny` and all of `glm5-full` {_BUILT}; kernels in an interpreter; never run",
}
_BF16_CPU: Final = "`{}` kept: `parity` against `transformers`; quantized: its build's self-check"
_SHOWN: Final[dict[tuple[str, WeightForm], str]] = {
    ("deepseek_v32", "nvfp4"): f"{_LAYERS}, and their engine by `parity`",
}
TABLE: Final = _rows()


def supported(family: str, form: WeightForm) -> dict[Backend, Support]:
    """Return the rows of a family and a form, by what engines are for."""
    return {row.backend: row for row in TABLE if (row.family, row.form) == (family, form)}


def sentence(row: Support) -> str:
    """Say a row in one line, for terminals."""
    shown = row.shown_by.replace("`", "")
    numerics = f"numerics {', '.join(row.numerics)}; " if row.works else ""
    return f"{TARGETS[row.backend]}: {numerics}{shown}"


def markdown() -> str:
    """Return the table as docs/index.md has it; forms that are alike for a target share a line."""
    lines = ["| family | checkpoint | target | numerics | shown by |", "|---|---|---|---|---|"]
    merged: dict[tuple[str, Backend, tuple[str, ...], str], list[str]] = {}
    for row in TABLE:
        merged.setdefault((row.family, row.backend, row.numerics, row.shown_by), []).append(WORDS[row.form])
    for (family, backend, numerics, shown), forms in merged.items():
        said = ", ".join(f"`{name}`" for name in numerics) or "–"
        lines.append(f"| `{family}` | {'; '.join(forms)} | {TARGETS[backend]} | {said} | {shown} |")
    return "\n".join(lines) + "\n"
