"""Build targets: data files of `configs/targets/`, checked."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import ValidationError

from seekforge.exporter.configs import known, load_yaml
from seekforge.plugins.errors import TargetError
from seekforge.plugins.formats.manifest import Limits
from seekforge.plugins.formats.program import Strict


class TargetConfig(Strict):
    """One target: which backend compiles for it, in which formats, with which default limits."""

    name: str
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    sm: int | None
    activations: Literal["f32", "bf16"]
    kv_format: Literal["f32", "bf16", "fp8_ds"]
    limits: Limits


def load_target(name: str) -> TargetConfig:
    """Return the target called `name`.

    Raises:
        TargetError: unknown (the message lists the known ones), or its file is malformed.
    """
    raw = load_yaml("targets", name)
    if raw is None:
        names = known("targets")
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise TargetError(f"unknown target {name!r}, expected one of: {', '.join(names)}{hint}")
    try:
        return TargetConfig.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise TargetError(f"configs/targets/{name}.yaml: key {key!r}: {fault['msg']}") from None
