"""Refuse a GPU engine that does not belong here, before anything is deserialised.

`manifest.load_manifest` finds an edited manifest and `manifest.verify_files` a changed or truncated file; this finds
another GPU, another operator version, kernels that are missing, and weights of another structure. A backend calls
`check_loadable` first, and `check_weights` when it opens the checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from seekforge.plugins.errors import CheckpointError, EngineError
from seekforge.plugins.formats.manifest import Manifest
from seekforge.plugins.registry import SPECS
from seekforge.plugins.tensorrt.launch import Descriptors


def rebuild_command(folder: Path, manifest: Manifest, **changes: object) -> str:
    """Return the command that builds this engine again, with `changes` to its options (name -> value)."""
    options: dict[str, object] = {"target": manifest.target.name}
    if manifest.weights is not None and manifest.weights.path is not None:
        options["checkpoint"] = manifest.weights.path
    options |= manifest.limits.model_dump()
    options |= changes
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["seekforge", "build", "PROGRAM", str(folder), *words, "--force"])


def check_loadable(folder: Path, manifest: Manifest, *, sm: int, versions: Mapping[str, str]) -> None:
    """Refuse an engine that cannot run on this GPU with these libraries.

    Args:
        folder: the engine folder.
        manifest: of that folder, its files verified.
        sm: compute capability of the GPU, 89 for an L40S.
        versions: package -> version installed here.

    Raises:
        EngineError: naming the field, what was found, what was expected, and the command that builds it again.
    """
    again = rebuild_command(folder, manifest)
    target = manifest.target
    if manifest.audit is not None and manifest.audit.oversize:
        needs, usable = (manifest.audit.device_bytes[key] / (1 << 30) for key in ("total", "usable"))
        raise EngineError(
            f"{folder}: audit.oversize is true: it needs {needs:.1f} GiB and {target.name} has {usable:.1f} GiB; "
            "it was built with --allow-oversize to be looked at, 'seekforge plan' says what it runs on"
        )
    built_for = target.sms or ((target.sm,) if target.sm is not None else ())
    if sm not in built_for:
        expected = " or ".join(f"sm{one}" for one in built_for) or "no GPU"
        raise EngineError(
            f"{folder}: target.sm: this GPU is sm{sm}, the engine is for {expected} ({target.name}); "
            "build it for a target of this GPU ('seekforge targets' lists them)"
        )
    for package, version in manifest.runtime_versions.items():
        found = versions.get(package, "not installed")
        if found != version:
            raise EngineError(
                f"{folder}: runtime_versions.{package}: found {found}, expected {version}; "
                f"pip install '{package}=={version}', or build it again here: {again}"
            )
    for op, use in manifest.plugins.items():
        version = SPECS[op].version if op in SPECS else None
        if version != use.version:
            raise EngineError(
                f"{folder}: plugins.{op}.version: this seekforge has {version}, the engine {use.version}; "
                f"build it again: {again}"
            )
    descriptors = Descriptors(folder, sm)
    for op, use in manifest.plugins.items():
        if use.num_layers:
            try:
                descriptors.find(op, use.kernel_digest)
            except EngineError as error:
                raise EngineError(f"{folder}: plugins.{op}.kernel_digest: {error}: {again}") from None


def check_kernels(folder: Path, manifest: Manifest) -> None:
    """Refuse an engine whose plugins were built without compiled kernels; needs no GPU to know.

    Raises:
        EngineError: naming the first such operator.
    """
    bare = [op for op, use in manifest.plugins.items() if use.num_layers and not use.kernel_digest]
    if bare:
        raise EngineError(
            f"{folder}: plugins.{bare[0]}.kernel_digest: empty, it was built with --no-kernels to be looked at; "
            f"build it with kernels: {rebuild_command(folder, manifest)}"
        )


def check_weights(folder: Path, manifest: Manifest, index_digest: str, checkpoint: Path) -> None:
    """Refuse weights of another structure than those that the engine was built for.

    Args:
        folder: the engine folder.
        manifest: of that folder.
        index_digest: of `checkpoint`.
        checkpoint: the weights' folder.

    Raises:
        CheckpointError: they differ.
    """
    expected = None if manifest.weights is None else manifest.weights.index_digest
    if expected is not None and index_digest != expected:
        built = "" if manifest.weights is None or manifest.weights.path is None else f" (at {manifest.weights.path})"
        raise CheckpointError(
            f"{checkpoint}: index and headers have digest {index_digest[:12]}, the engine {folder} was built for "
            f"{expected[:12]}{built}; pass the right --checkpoint, or build it again"
        )
