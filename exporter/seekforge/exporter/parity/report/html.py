"""The pages' templates. Everything that a template is given is text and escaped where it stands, unless it is markup
that a template made; what a browser would obey or hide (controls, overrides of direction) is shown as on a terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from seekforge.common.cli.terminal import shown

#: A short text that begins with a digit is set as a number is.
_LONGEST_NUMBER = 8


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else shown(value)


def _numeric(value: Any) -> bool:
    if isinstance(value, str):
        return value[:1].isdigit() and len(value) <= _LONGEST_NUMBER
    return isinstance(value, int | float)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.tests["numeric"] = _numeric


def page(name: str, **values: Any) -> str:
    """Return a whole page."""
    return _TEMPLATES.get_template(name).render(values)


def piece(name: str, *values: Any) -> Markup:
    """Return a macro of `pieces.html`, filled."""
    return getattr(_TEMPLATES.get_template("pieces.html").module, name)(*values)
