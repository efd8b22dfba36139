"""A file of prompts: a line each."""

from pathlib import Path

import pytest

from seekforge.common.errors import ConfigError
from seekforge.formats.parity_steps import read_prompts


def test_a_prompt_ends_at_a_newline_alone(tmp_path: Path) -> None:
    """Text holds what Python calls line ends too; a file of another system has two characters for one."""
    path = tmp_path / "prompts"
    path.write_bytes("a\u2028b\x85c\r\n\r\n \n d\x0b\n".encode())
    assert read_prompts(path) == ["a\u2028b\x85c", " d\x0b"]


@pytest.mark.parametrize("content", [b"", b"\r\n \n", b"\xff"])
def test_what_holds_no_prompt_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="expected one prompt a line"):
        read_prompts(path)
