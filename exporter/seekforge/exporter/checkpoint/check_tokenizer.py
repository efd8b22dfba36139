"""The tokenizer of a checkpoint, checked at export, so that no fault waits for the first text."""

from __future__ import annotations

from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from seekforge.common.errors import CheckpointError
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.tokenizer_file import open_tokenizer

_TAKE = "take the tokenizer.json that came with these weights"


def check_tokenizer(folder: Path, config: ModelConfig) -> tuple[str, ...]:
    """Check the tokenizer of a checkpoint against its config.

    Args:
        folder: holds tokenizer.json.
        config: the model.

    Returns:
        A sentence for what the file asks for and is not done.

    Raises:
        CheckpointError: it cannot be read, is cut off, or has ids that the model does not have.
    """
    path = folder / "tokenizer.json"
    opened = open_tokenizer(path, error=CheckpointError, again=_TAKE)
    ids = opened.tokenizer.get_vocab(with_added_tokens=True)
    last = max(ids.values(), default=-1)
    if last >= config.vocab_size:
        raise CheckpointError(
            f"{path}: has {len(ids):,} tokens with ids up to {last}, config.json has vocab_size {config.vocab_size}; "
            "take the tokenizer.json that came with these weights"
        )
    known = set(ids.values())
    for key in ("bos_token_id", "eos_token_id"):
        value = getattr(config, key)
        for token in value if isinstance(value, tuple | list) else (value,):
            if token not in known:
                raise CheckpointError(
                    f"{path}: has no token of id {token}, the {key} of config.json; it is cut off or of another model, "
                    "take the tokenizer.json that came with these weights"
                )
    missing = sorted(set(ByteLevel.alphabet()) - ids.keys())
    if missing:
        raise CheckpointError(
            f"{path}: has no token for {len(missing)} of the 256 bytes ({missing[0]!r} first), so some text could not "
            "be encoded; it is cut off or of another model, take the tokenizer.json that came with these weights"
        )
    if not opened.switched_off:
        return ()
    wanted = " and for ".join(opened.switched_off)
    return (f"tokenizer.json asks for {wanted}: this is not done, prompts stay as they are",)
