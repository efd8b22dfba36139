"""Text to token ids and back, byte by byte, so that streaming never shows half a character.

A token of a byte-level BPE is a run of bytes. The detokeniser collects bytes and gives out what is complete
UTF-8, so the deltas of a stream join to exactly the text of all its tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

from tokenizers.decoders import ByteLevel

from seekforge.plugins.errors import EngineError, RequestError
from seekforge.plugins.formats.tokenizer_file import guarded, read_tokenizer


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
        self._tokenizer = read_tokenizer(path, error=EngineError, again="build the engine again")
        if not isinstance(self._tokenizer.decoder, ByteLevel):
            raise EngineError(
                f"{path}: its decoder is {type(self._tokenizer.decoder).__name__}, expected ByteLevel; "
                "take the tokenizer.json of the checkpoint"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a token; a model may have more."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; special tokens written in it become their ids.

        Raises:
            RequestError: `text` is not valid Unicode (it holds half of a surrogate pair).
        """
        try:
            return guarded(self._tokenizer.encode, text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise RequestError(f"the prompt cannot be encoded ({error}); pass valid Unicode text") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise RequestError(f"the prompt cannot be encoded: the tokenizer refuses it ({error})") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` stands for; none for special and unknown ids."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._look_up(token)
        return known

    def _look_up(self, token: int) -> bytes:
        text = None if token in self._special else self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if all(char in _BYTE_OF_CHAR for char in text):
            return bytes(_BYTE_OF_CHAR[char] for char in text)
        return text.encode()  # an added token is its own text


class Detokenizer:
    """Turns the tokens of one stream into text as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take one token and return the text that it completes; empty while a character is unfinished."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that never got its last byte, else nothing."""
        return self._decoder.decode(b"", final=True)
