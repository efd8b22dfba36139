"""What Dynamo's frontend reads of a model: a folder like that of a checkpoint, without weights.

The frontend encodes prompts and writes text by the tokenizer that the worker names. An engine has that of its
checkpoint, and its manifest the `config.json`.
"""

from __future__ import annotations

from pathlib import Path

from seekforge.common.errors import EnvironmentFault
from seekforge.common.files import json_text, replace_file
from seekforge.common.reading import LISTING_BYTES, SETTINGS_BYTES, read_bytes
from seekforge.common.user_cache import user_cache
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.program import TEMPLATE_FILE, TEXT_FILES
from seekforge.runtime.chat.template import checkpoint_template


def model_card(engine: Path, manifest: Manifest) -> Path:
    """Return the folder of an engine's files, which is written where it is not there.

    The frontend takes workers of one name for replicas where their files and the path of their folder are the same. So
    it is in the user's cache, under the engine's digest.

    Args:
        engine: the engine's folder.
        manifest: its manifest.

    Raises:
        EnvironmentFault: the user has no cache.
        OSError: the files cannot be written or read.
    """
    cache = user_cache()
    if cache is None:
        raise EnvironmentFault(
            "HOME names no folder, and what Dynamo reads of a model has to be in one; set XDG_CACHE_HOME"
        )
    folder = cache / "dynamo" / manifest.digest[:32]
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer_config.json": b"{}\n"}
    for name in TEXT_FILES:
        if (engine / name).is_file():
            most = SETTINGS_BYTES if name == TEMPLATE_FILE else LISTING_BYTES
            files[name] = bytes(read_bytes(engine / name, most=most))
    config = {**manifest.config, "eos_token_id": list(manifest.eos_token_ids)}
    files["config.json"] = json_text(config).encode()
    for name, content in files.items():
        replace_file(folder / name, content)
    return folder


def endpoint_types(engine: Path, name: str) -> str:
    """Return which of OpenAI's endpoints the frontend can offer: it has to make a prompt of a conversation itself.

    It has a form of its own for models whose name says that they are DeepSeek-V3.2; others need the template of their
    checkpoint.

    Source: ai-dynamo/dynamo, lib/llm/src/preprocessor/prompt/template.rs, `PromptFormatter::from_mdc`.
    """
    lower = name.lower()
    is_known = "deepseek" in lower and "v3.2" in lower and "exp" not in lower
    return "chat,completions" if is_known or checkpoint_template(engine) is not None else "completions"
