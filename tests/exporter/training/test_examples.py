"""Files of examples: one in each line, and a line at fault is named."""

from pathlib import Path

import pytest

from seekforge.common.errors import ConfigError
from seekforge.exporter.training.examples import read_examples
from seekforge.exporter.training.tasks import Piece


def test_a_text_may_hold_what_unicode_calls_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\r\n\n{"prompt": "c", "completion": "d\x85"}', encoding="utf-8")
    assert read_examples(path) == [[Piece("a\u2028b", True)], [Piece("c"), Piece("d\x85", True)]]


@pytest.mark.parametrize("line", [b"\xff", b"{", b'{"text": 1}', b'{"prompt": "a"}', b"[" * 5000])
def test_a_line_at_fault_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(ConfigError, match=r"rows\.jsonl: line 2: "):
        read_examples(path)
