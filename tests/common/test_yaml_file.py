"""Settings in YAML are plain values; whatever else YAML can do is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.common.yaml_file import YamlError, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x [1]\nb: *x", "line 2 has an alias"),
        ("a: &x [*x]", "has an alias"),
        ("a: 1\na: 2", "line 2 names 'a' twice"),
        ("? [1]\n: 2", "key that is no text"),
        ("a: !!python/object/apply:os.system ['true']", "expected a plain value"),
        ("a: !!binary aGk=", "has the type 'binary'"),
        ("a: !!timestamp 2001-99-01", "has the type 'timestamp'"),
        ("a: !!set {x}", "has the type 'set'"),
        ("a: " + "9" * 30, "at most 64 bits"),
        ("a: 0x10", "expected a whole number"),
        ("a: 1:30", "expected a whole number"),
        ("a: .inf", "expected a finite number"),
        ("a: .nan", "expected a finite number"),
        ("a: 1.0e+999", "expected a finite number"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("[" * 16_000, "nested deeper than 32"),
        ("a: [", "expected"),
        ("a: \x00", "not allowed"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: b\n---\nc: d", "but found another document"),
        ("x" * 17_000, "expected at most"),
    ],
)
def test_what_settings_never_need_is_refused(text: str, problem: str) -> None:
    with pytest.raises(YamlError, match=problem):
        parse_yaml(text)


def test_plain_values_are_read() -> None:
    text = "a: 1\nb: [-2, 0.5, 1e3, yes, null, 'x', 1e-6]\nc: {d: 2001-99-01, e: 1_000}\n"
    assert parse_yaml(text) == {
        "a": 1, "b": [-2, 0.5, 1000.0, True, None, "x", 1e-6], "c": {"d": "2001-99-01", "e": 1000},
    }  # fmt: skip


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(YamlError, match="no UTF-8"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(OSError, match="is a device"):
        read_yaml(Path("/dev/zero"))
