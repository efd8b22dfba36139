"""A byte-level BPE tokenizer in DeepSeek's layout, trained on the text that this package carries.

Same pre-tokenization, special tokens and files as the released tokenizer, so that everything written against
it works here; only the merges are few. Any text round-trips exactly, since all 256 bytes are in the alphabet.

Source: DeepSeek-V3.1 tokenizer.json, `pre_tokenizer`, `added_tokens`; spec §8.1.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from seekforge.common.errors import ConfigError
from seekforge.common.files import write_json

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"

#: Added after the merges, in the released order (there: ids 128798 to 128814). True: skipped by decode.
_ADDED: tuple[tuple[str, bool], ...] = (
    ("<think>", False),
    ("</think>", False),
    ("<｜fim▁hole｜>", False),
    ("<｜fim▁begin｜>", False),
    ("<｜fim▁end｜>", False),
    ("<｜User｜>", False),
    ("<｜Assistant｜>", False),
    ("<|EOT|>", True),
    ("<｜tool▁calls▁begin｜>", False),
    ("<｜tool▁calls▁end｜>", False),
    ("<｜tool▁call▁begin｜>", False),
    ("<｜tool▁call▁end｜>", False),
    ("<｜tool▁outputs▁begin｜>", False),
    ("<｜tool▁outputs▁end｜>", False),
    ("<｜tool▁output▁begin｜>", False),
    ("<｜tool▁output▁end｜>", False),
    ("<｜tool▁sep｜>", False),
)

#: Ids at the end of the vocabulary that no token has, as 128815 to 129279 in the released model.
_PADDED_IDS = 8

_DIGITS = r"\p{N}{1,3}"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def train_tokenizer(vocab_size: int, texts: Iterable[str] | None = None) -> Tokenizer:
    """Train a tokenizer whose ids are all below `vocab_size`; the same bytes for the same size and texts.

    Args:
        vocab_size: number of ids of the model.
        texts: what its merges are learned from; None: the text that this package carries.

    Raises:
        ConfigError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    room = vocab_size - len(_ADDED) - _PADDED_IDS
    if room < 3 + 256:
        least = 3 + 256 + len(_ADDED) + _PADDED_IDS
        raise ConfigError(f"vocab_size is {vocab_size}, expected at least {least} (special tokens and all bytes)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(_CJK), "isolated"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    # sets nothing but offsets: BOS is part of the encoded string (spec §8.1)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=1,
        show_progress=False,
        special_tokens=[_added(token, special=True) for token in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus().splitlines(keepends=True) if texts is None else texts, trainer)
    tokenizer.add_tokens([_added(token, special=special) for token, special in _ADDED])
    return tokenizer


def write_tokenizer(folder: Path, vocab_size: int, ends: Collection[int] = ()) -> None:
    """Write tokenizer.json and tokenizer_config.json (spec §1.1) into `folder`.

    Args:
        folder: where they go.
        vocab_size: number of ids of the model.
        ends: ids that have to be of tokens; those that end a sequence by config.json.

    Raises:
        ConfigError: `train_tokenizer` raises it.
    """
    tokenizer = train_tokenizer(vocab_size)
    missing = set(ends) - set(tokenizer.get_vocab().values())
    write_tokenizer_files(folder, _with_ends(tokenizer, missing) if missing else tokenizer)


def _with_ends(tokenizer: Tokenizer, ids: Collection[int]) -> Tokenizer:
    """Return the tokenizer with a special token for each of `ids`, wherever they lie."""
    content = json.loads(tokenizer.to_str(pretty=False))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": one, "content": f"<|end_{one}|>", **flags} for one in sorted(ids)]
    # tokens that the merges do not know are numbered one after the other: those keep their ids which are known there
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    return Tokenizer.from_str(json.dumps(content))


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the two files of a tokenizer into `folder`."""
    text = tokenizer.to_str(pretty=False)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(text), ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "legacy": True,
        "model_max_length": 131072,
        "pad_token": EOS,
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _corpus() -> str:
    return Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8")
