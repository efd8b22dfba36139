"""Text to token ids and back, byte by byte, so that streaming never shows half a character.

A token of a byte-level BPE is a run of bytes. The detokenizer collects bytes and gives out what is complete
UTF-8, so the deltas of a stream join to exactly the text of all its tokens.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from seekforge.common.errors import EngineError, RequestError
from seekforge.formats.checkpoint.tokenizer_file import guarded, read_tokenizer
from seekforge.runtime.text.segments import SegmentedText
from seekforge.runtime.text.vocabulary import Vocabulary

#: From so many characters on a text is encoded without holding up other threads.
_LONG = 256
# Texts are encoded one by one, so a pool of threads brings nothing, and it does not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _byte_of_char() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """A `tokenizer.json` with a byte-level decoder, as every DeepSeek-V3 model has.

    Nothing is added to what is encoded: a prompt that should start with the begin-of-sequence token must contain its
    text. Decoding leaves out tokens marked special (begin and end of sequence) and ids that have no token.
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            EngineError: it cannot be read, or its decoder is not byte-level.
        """
        self._tokenizer = read_tokenizer(
            path, error=EngineError, again="take the tokenizer.json of the checkpoint, then export and build again"
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._added = {token: entry.content for token, entry in added.items()}
        self._reaching = [
            entry.content for entry in added.values() if entry.lstrip or entry.rstrip or entry.single_word
        ]
        self._bytes: dict[int, bytes] = {}

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens marked special, which have no text unless they are asked for."""
        return self._special

    @property
    def added_texts(self) -> dict[int, str]:
        """The texts of tokens that are not of the byte-level vocabulary: special ones, and others like `<think>`."""
        return dict(self._added)

    @cached_property
    def special_texts(self) -> re.Pattern[str] | None:
        """What finds the text of a special token; None where there is none."""
        texts = sorted((self._added[token] for token in self._special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @cached_property
    def added_pattern(self) -> re.Pattern[str] | None:
        """What finds the text of any token of `added_texts`, the longest where several begin; None: there is none."""
        texts = sorted(filter(None, self._added.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of all tokens, to be searched."""
        return Vocabulary([self.written_bytes(token) for token in range(self._num_ids)])

    @cached_property
    def _num_ids(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a token; a model may have more."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; special tokens written in it become their ids.

        Raises:
            RequestError: `text` is not valid Unicode (it holds half of a surrogate pair).
        """
        return self._encode(self._tokenizer, text)

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of `text` in which no token of `added_texts` occurs, whatever the text says.

        Raises:
            RequestError: `text` is not valid Unicode.
        """
        ids = self._encode(self._plain, text)
        if self._ids_of_added.isdisjoint(ids):
            return ids
        # merges that spell the text of an added token: by single characters none of them is reached
        if len(text) > 1:
            half = len(text) // 2
            return [*self.encode_text(text[:half]), *self.encode_text(text[half:])]
        raise RequestError(f"the text {text!r} has no tokens but a special one; leave it out")

    def encode_segments(self, prompt: SegmentedText, most: int) -> list[int]:
        """Return the token ids of a prompt: special tokens are recognized in its special segments alone.

        Where no other segment holds the text of a special token these are the ids of the whole text. A prompt that is
        far beyond `most` tokens is refused before all of it is encoded, as by `encode_at_most`.

        Raises:
            RequestError: the prompt has far more tokens, or is not valid Unicode.
            EngineError: special tokens of this vocabulary reach into the text beside them.
        """
        if self._reaching:
            raise EngineError(
                f"tokenizer.json: the token {self._reaching[0]!r} takes spaces or words beside it, so a prompt cannot "
                "be encoded in segments; pass it as one text"
            )
        ids: list[int] = []
        for text, token in self._spans(prompt):
            if token is not None:
                ids.append(token)
            elif text:
                ids += self.encode_text(text) if len(text) <= most else self._at_most(self.encode_text, text, most)
            if len(ids) > 2 * most:
                raise RequestError(
                    f"the prompt has {len(prompt.text):,} characters and more than {len(ids):,} tokens; at most "
                    f"{most:,} tokens are taken here, with what is generated; shorten the prompt"
                )
        return ids

    def _spans(self, prompt: SegmentedText) -> Iterator[tuple[str, int | None]]:
        """Yield the texts between special tokens, across the borders of segments, and those tokens."""
        pattern, waiting = self.added_pattern, list[str]()
        for segment in prompt.segments:
            at = 0
            for match in pattern.finditer(segment.text) if segment.special and pattern is not None else ():
                waiting.append(segment.text[at : match.start()])
                yield "".join(waiting), None
                yield match[0], self._id_of_added[match[0]]
                waiting, at = [], match.end()
            waiting.append(segment.text[at:])
        yield "".join(waiting), None

    def token_id(self, text: str) -> int | None:
        """Return the token of `added_texts` with this text; None where there is none."""
        return self._id_of_added.get(text)

    @cached_property
    def _id_of_added(self) -> dict[str, int]:
        return {text: token for token, text in self._added.items()}

    @cached_property
    def _ids_of_added(self) -> frozenset[int]:
        return frozenset(self._added)

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer without added tokens; it shares the vocabulary."""
        plain: Any = tokenizers.Tokenizer(self._tokenizer.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._tokenizer, part) is not None:
                setattr(plain, part, getattr(self._tokenizer, part))
        return plain

    def _encode(self, tokenizer: Any, text: str) -> list[int]:
        try:
            if len(text) < _LONG:
                return guarded(tokenizer.encode, text, add_special_tokens=False).ids
            # of the two only this one lets other threads run, for as long as it takes
            return guarded(tokenizer.encode_batch, [text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeError) as error:
            raise RequestError(f"the prompt cannot be encoded ({error}); pass valid Unicode text") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise RequestError(f"the prompt cannot be encoded: the tokenizer refuses it ({error})") from None

    def encode_at_most(self, text: str, most: int) -> list[int]:
        """As `encode`, but a text that is far beyond `most` tokens is refused before all of it is encoded.

        The beginning of a text has about as many tokens by itself as within the whole; twice as many are far beyond.
        So what a hopeless text costs depends on `most`, not on its length.

        Raises:
            RequestError: the text has far more tokens, or is not valid Unicode.
        """
        return self._at_most(self.encode, text, most)

    def _at_most(self, encode: Callable[[str], list[int]], text: str, most: int) -> list[int]:
        size = 16 * max(most, 64)
        while size < len(text):
            count = len(encode(text[:size]))
            if count > 2 * most:
                raise RequestError(
                    f"the prompt has {len(text):,} characters, of which the first {size:,} are {count:,} tokens; "
                    f"at most {most:,} tokens are taken here, with what is generated; shorten the prompt"
                )
            size *= 4
        return encode(text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        bytes_of = self.token_bytes if skip_special_tokens else self.written_bytes
        return b"".join(map(bytes_of, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` stands for; none for special and unknown ids."""
        return b"" if token in self._special else self.written_bytes(token)

    def written_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` stands for where special tokens are written out; none for unknown ids."""
        known = self._bytes.get(token)
        if known is None:
            if not 0 <= token < self._num_ids:  # not kept: anybody may name any number
                return b""
            known = self._bytes[token] = self._look_up(token)
        return known

    def token_text(self, token: int) -> str:
        """Return what one token looks like by itself; half a character is U+FFFD."""
        return self.written_bytes(token).decode("utf-8", "replace")

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()  # an added token is its own text
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if all(char in _BYTE_OF_CHAR for char in text):
            return bytes(_BYTE_OF_CHAR[char] for char in text)
        return text.encode()


class Detokenizer:
    """Turns the tokens of one stream into text as they come."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._bytes_of = tokenizer.token_bytes if skip_special_tokens else tokenizer.written_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take one token and return the text that it completes; empty while a character is unfinished."""
        return self._decoder.decode(self._bytes_of(token))

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that never got its last byte, else nothing."""
        return self._decoder.decode(b"", final=True)
