"""A prompt in segments: what the chat encoding wrote, and what came from outside.

Special tokens are recognized in the first alone. A text that looks like one is text wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt.

    Attributes:
        text: what it says.
        special: whether special tokens written in it become their ids.
    """

    text: str
    special: bool = False


@dataclass(frozen=True)
class SegmentedText:
    """A prompt whose special tokens are those of its special segments.

    Attributes:
        segments: neighbors differ in `special`.
        in_reasoning: whether the completion begins inside a thought, which `</think>` ends.
    """

    segments: tuple[Segment, ...]
    in_reasoning: bool = False

    @staticmethod
    def of(segments: Iterable[Segment], *, in_reasoning: bool = False) -> SegmentedText:
        """Join neighbors of one kind and leave out what is empty."""
        runs: list[tuple[bool, list[str]]] = []
        for segment in segments:
            if not segment.text:
                continue
            if runs and runs[-1][0] == segment.special:
                runs[-1][1].append(segment.text)
            else:
                runs.append((segment.special, [segment.text]))
        return SegmentedText(tuple(Segment("".join(parts), special) for special, parts in runs), in_reasoning)

    @cached_property
    def text(self) -> str:
        """The whole prompt, as it would be read with all special tokens in it."""
        return "".join(segment.text for segment in self.segments)

    def __str__(self) -> str:
        return self.text
