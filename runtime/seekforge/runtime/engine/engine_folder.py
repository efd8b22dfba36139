"""An engine folder, checked: what it is, what it needs, whether this machine has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.common.paths import same_names
from seekforge.common.reading import LISTING_BYTES, read_json
from seekforge.common.requirements import install
from seekforge.common.system import check_platform
from seekforge.formats.checkpoint.hub import resolve
from seekforge.formats.engine.agreement import ROPE_TABLES
from seekforge.formats.engine.manifest import MANIFEST, Manifest, Target, load_manifest
from seekforge.formats.engine.verify import OnVerify, Verification, verify_files
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.step_io import ROW_RESULTS
from seekforge.runtime.backends import (
    BACKENDS,
    Backend,
    BackendFactory,
    backend_factory,
    extra_of,
    ranks_factory,
)
from seekforge.runtime.backends.base import OnLoad
from seekforge.runtime.compatibility import check_complete, check_versions, installed_versions
from seekforge.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Engine:
    """A checked engine folder; nothing is loaded yet.

    Attributes:
        folder: the path of the folder.
        manifest: what it says of itself.
        verification: what of it was compared with its digests.
    """

    folder: Path
    manifest: Manifest
    verification: Verification = field(default_factory=Verification)

    @staticmethod
    def open(
        folder: Path | str, *, verify: bool = False, part: bool = False, progress: OnVerify | None = None
    ) -> Engine:
        """Read and check an engine folder.

        Args:
            folder: written by `seekforge build`.
            verify: read every byte, also of files that were compared with their digests at an earlier start and
                that nobody wrote to since.
            part: some layers of a model will do: nothing is decoded, a parity check looks at them.
            progress: called while files are compared with their digests.

        Raises:
            EngineError: not an engine folder, damaged, or made for another version.
            EnvironmentFault: a library that it needs is not installed, or the system is none that seekforge runs on.
        """
        check_platform()
        folder = Path(folder)
        manifest = load_manifest(folder)
        _check_paths(folder, manifest)
        _check_graph_io(folder, manifest, part)
        verification = verify_files(folder, manifest, full=verify, progress=progress)
        _check_tables(folder, manifest)
        check_versions(folder, manifest, installed_versions(manifest.runtime_versions))
        return Engine(folder, manifest, verification)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer, read at first use."""
        return Tokenizer(self.folder / self.manifest.tokenizer)

    def open_backend(
        self, *, threads: int | None = None, checkpoint: Path | None = None, progress: OnLoad | None = None
    ) -> Backend:
        """Load the compiled graphs.

        Args:
            threads: CPU threads for one operator; None takes the cores this process may use.
            checkpoint: where the weights are, of an engine that holds none: a folder, or a repository of the hub, which
                is downloaded; None takes where they were at build.
            progress: called while weights are read from a checkpoint.

        Raises:
            EngineError: the backend is unknown here or cannot load the graphs, or its plugins have no kernels.
            EnvironmentFault: the backend's library is not installed.
        """
        check_complete(self.folder, self.manifest)
        if checkpoint is not None and self.manifest.weights is not None:
            checkpoint = resolve(checkpoint)
        factory = _factory(self.manifest.target) if self.manifest.ranks is None else ranks_factory()
        return factory(self.folder, self.manifest, threads=threads, checkpoint=checkpoint, progress=progress)

    def cache_bytes(self, num_tokens: int, num_sequences: int = 1) -> int:
        """Return the size of caches for `num_sequences` sequences of `num_tokens` tokens, scrap block included."""
        blocks = num_sequences * blocks_needed(num_tokens, self.manifest.cache.block_size) + 1
        return blocks * self.manifest.cache.bytes_per_block


def _factory(target: Target) -> BackendFactory:
    try:
        return backend_factory(target.backend)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("seekforge"):
            raise
        raise EnvironmentFault(
            f"the engine runs on {target.backend}, but the module {error.name!r} is not installed; "
            f"{install(extra_of(target.backend, target.provider))}"
        ) from None


def _check_paths(folder: Path, manifest: Manifest) -> None:
    """A manifest names each of its files once, and digests every file that is going to be opened."""
    digested = {file.path for file in manifest.files}
    twice = same_names([file.path for file in manifest.files])
    if twice is not None:
        raise EngineError(f"{folder / MANIFEST}: files {twice[0]!r} and {twice[1]!r} are one; build the engine again")
    opened = [manifest.tokenizer, *manifest.uses()]
    for path in opened:
        if path not in digested:
            raise EngineError(f"{folder / MANIFEST}: {path!r} has no digest under 'files'; build the engine again")


def _check_tables(folder: Path, manifest: Manifest) -> None:
    """The tables that an engine of the CPU holds reach as far as its longest sequence."""
    name, longest = "bindings.json", manifest.limits.max_model_len
    if manifest.target.backend != "onnxruntime" or name not in {file.path for file in manifest.files}:
        return
    try:
        graphs = read_json(folder / name, most=LISTING_BYTES)["graphs"]
        rows = [graphs[graph][table]["shape"][0] for graph in graphs for table in ROPE_TABLES if table in graphs[graph]]
        short = min(rows, default=longest) < longest
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise EngineError(f"{folder / name}: malformed ({type(error).__name__}); build the engine again") from None
    if short:
        raise EngineError(
            f"{folder / MANIFEST}: limits.max_model_len is {longest}, the engine's tables have {min(rows)} positions; "
            "the manifest was edited, copy it again or build the engine again"
        )


def _check_graph_io(folder: Path, manifest: Manifest, part: bool) -> None:
    """The engine can be decoded from, unless a part will do: a whole model, with the results a step must give."""
    where = folder / MANIFEST
    if manifest.target.backend not in BACKENDS:
        backend_factory(manifest.target.backend)  # raises, naming what there is
    if "model" not in manifest.graphs:
        raise EngineError(f"{where}: graphs are {', '.join(manifest.graphs) or 'none'}, expected 'model'; build again")
    graph = manifest.graphs["model"]
    outputs = {spec.name for spec in graph.outputs}
    missing = [name for name in ROW_RESULTS if name not in outputs]
    takes_tokens = any(spec.name == "input_ids" for spec in graph.inputs)
    if (missing or not takes_tokens) and not part:
        first, last = manifest.layer_range
        raise EngineError(
            f"{folder}: holds layers {first} to {last - 1} only, "
            f"{'without ' + ', '.join(missing) if missing else 'without input_ids'}; "
            "text needs an engine of all layers: export without a layer range"
        )
    inputs = {spec.name for spec in graph.with_role("cache")}
    aliased = {target for source, target in graph.aliases.items() if source in outputs}
    if inputs != aliased:
        name = sorted(inputs ^ aliased)[0]
        raise EngineError(f"{where}: cache {name} is not paired with an output under 'aliases'; build the engine again")
