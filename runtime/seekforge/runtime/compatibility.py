"""Refuse a GPU engine that does not belong here, before anything is deserialized.

`manifest.load_manifest` finds an edited manifest and `manifest.verify_files` a changed or truncated file; this finds
another GPU, another operator version, kernels that are missing, and weights of another structure. `check_complete`
knows without a GPU what loads nowhere. A backend calls `check_loadable` first, and `check_weights` when it opens the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from seekforge.common.errors import CheckpointError, EngineError, EnvironmentFault
from seekforge.common.reading import is_there, read_json
from seekforge.common.requirements import install_exactly, installed
from seekforge.formats.engine.manifest import Manifest, rebuild_command
from seekforge.plugins.kernels.cuda_driver import too_old
from seekforge.plugins.kernels.index import Descriptors, kernel_sm
from seekforge.plugins.registry import SPECS

#: Keys of config.json that all layers of a model share: an engine may be of its first layers alone.
STRUCTURE = (
    "model_type",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)


def check_loadable(folder: Path, manifest: Manifest, *, sm: int, versions: Mapping[str, str]) -> None:
    """Refuse an engine that cannot run on this GPU with these libraries.

    Args:
        folder: the engine folder.
        manifest: the manifest of that folder, whose files are verified.
        sm: compute capability of the GPU, 89 for an L40S.
        versions: package -> version installed here.

    Raises:
        EngineError: naming the field, what was found, what was expected, and the command that builds it again.
    """
    again = rebuild_command(folder, manifest)
    target = manifest.target
    check_complete(folder, manifest)
    built_for = target.sms or ((target.sm,) if target.sm is not None else ())
    if sm not in built_for:
        expected = " or ".join(f"sm{one}" for one in built_for) or "no GPU"
        raise EngineError(
            f"{folder}: target.sm: this GPU is sm{sm}, the engine is for {expected} ({target.name}); build it for a "
            f"target of this GPU ('seekforge targets' lists them): {rebuild_command(folder, manifest, target='TARGET')}"
        )
    check_versions(folder, manifest, versions)
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


def check_driver(folder: Path, manifest: Manifest, *, sm: int, driver: int) -> None:
    """Refuse an engine whose compiled kernels the driver here does not load.

    Args:
        folder: the engine folder.
        manifest: the manifest of that folder.
        sm: compute capability of the GPU.
        driver: CUDA version of the driver, 13000 for 13.0.

    Raises:
        EnvironmentFault: the driver is too old.
    """
    fault = too_old(f"the kernels for sm{sm}", manifest.min_driver.get(str(kernel_sm(sm)), 0), driver)
    if fault is not None:
        raise EnvironmentFault(f"{folder}: min_driver.{kernel_sm(sm)}: {fault}")


def check_versions(folder: Path, manifest: Manifest, versions: Mapping[str, str]) -> None:
    """Refuse an engine whose compiled graphs need other versions of their library.

    Args:
        folder: the engine folder.
        manifest: the manifest of that folder.
        versions: package -> version installed here; a local build such as 1.32.0+abc is a 1.32.0.

    Raises:
        EnvironmentFault: the library is not installed.
        EngineError: its version is another one.
    """
    for package, version in manifest.runtime_versions.items():
        installed = versions.get(package)
        if installed is None:
            raise EnvironmentFault(
                f"{folder}: needs {package} {version}, which is not installed; {_install(package, version)}"
            )
        if version not in (installed, installed.partition("+")[0]):
            raise EngineError(
                f"{folder}: runtime_versions.{package}: found {installed}, expected {version}; "
                f"{_install(package, version)}, or build it again here: {rebuild_command(folder, manifest)}"
            )


def _install(package: str, version: str) -> str:
    return install_exactly(package, version) or "install it if you know who makes it"


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return package -> installed version; those that are not installed are left out."""
    versions = {package: installed(package) for package in packages}
    return {package: version for package, version in versions.items() if version is not None}


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Refuse an engine that was built to be looked at and loads nowhere; needs no GPU to know.

    Raises:
        EngineError: it does not fit its GPU, or its plugins have no compiled kernels.
    """
    if manifest.audit is not None and manifest.audit.oversize:
        needs, usable = (manifest.audit.device_bytes[key] / (1 << 30) for key in ("total", "usable"))
        raise EngineError(
            f"{folder}: audit.oversize is true: it needs {needs:.1f} GiB and {manifest.target.name} has {usable:.1f} "
            "GiB; it was built with --allow-oversize to be looked at, 'seekforge plan' says what it runs on"
        )
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
        manifest: the manifest of that folder.
        index_digest: the digest of the index of `checkpoint`.
        checkpoint: the weights' folder.

    Raises:
        CheckpointError: they differ. Of an engine that was built without a checkpoint, the configurations must agree.
    """
    expected = None if manifest.weights is None else manifest.weights.index_digest
    if expected is not None and index_digest != expected:
        built = "" if manifest.weights is None or manifest.weights.path is None else f" (at {manifest.weights.path})"
        raise CheckpointError(
            f"{checkpoint}: index and headers have digest {index_digest[:12]}, the engine {folder} was built for "
            f"{expected[:12]}{built}; pass the right --checkpoint, or build it again"
        )
    path = checkpoint / "config.json"
    if expected is None and is_there(path):
        try:
            config = read_json(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy the checkpoint again") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); copy the checkpoint again") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: is no JSON object, expected keys such as hidden_size; copy it again")
        for key in STRUCTURE:
            actual, wanted = config.get(key), manifest.config.get(key)
            if actual != wanted:
                raise CheckpointError(
                    f"{path}: {key} is {actual}, the engine {folder} was built for {wanted}; "
                    "pass the right --checkpoint, or build it again"
                )
