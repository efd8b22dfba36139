"""From messages to a prompt, by the encoder that the engine carries: DeepSeek-V3.2 has no template but a Python file.

It is part of the checkpoint, and executing it is executing a program of whoever made that: it is done for those only
who ask for it by name (`trust_checkpoint_code`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seekforge.common.errors import EngineError, RequestError
from seekforge.common.paths import inside
from seekforge.formats.engine.manifest import MANIFEST, Manifest

_ENCODER = "encoding/encoding_dsv32.py"


class ChatEncoder:
    """The chat encoding of one engine."""

    def __init__(self, folder: Path, manifest: Manifest, *, trust_checkpoint_code: bool) -> None:
        """Load the encoder.

        Args:
            folder: the folder of the engine.
            manifest: the manifest of that folder.
            trust_checkpoint_code: whether a Python file that came with the checkpoint may be executed.

        Raises:
            EngineError: the engine carries none, it is not trusted, or it cannot be loaded.
        """
        if _ENCODER not in {file.path for file in manifest.files}:
            raise EngineError(f"{folder}: has no {_ENCODER}; export a checkpoint that has it, or pass a plain prompt")
        path = inside(folder, _ENCODER, error=EngineError, where=folder / MANIFEST)
        if not trust_checkpoint_code:
            raise EngineError(
                f"{path}: chat executes this Python file, which came with the checkpoint; if you trust who made it, "
                "pass trust_checkpoint_code=True (--trust-checkpoint-code), else a plain prompt"
            )
        spec = importlib.util.spec_from_file_location("seekforge_chat_encoding", path)
        try:
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self._encode: Any = module.encode_messages
        except Exception as error:  # whatever a foreign module raises
            raise EngineError(f"{path}: cannot be loaded ({type(error).__name__}: {error}); build again") from None

    def encode(self, messages: Sequence[Mapping[str, Any]], *, thinking: bool) -> str:
        """Return the prompt, begin-of-sequence included.

        Raises:
            RequestError: the messages cannot stand like this.
        """
        if not messages:
            raise RequestError("the conversation has no messages; pass at least one")
        try:
            return self._encode([dict(m) for m in messages], thinking_mode="thinking" if thinking else "chat")
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise RequestError(f"the messages cannot be encoded: {error}") from None
