"""Which tools a completion may call, and the Lark grammar of calls that fit their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.runtime.chat import markup
from seekforge.runtime.values import shown

#: References of a schema are followed so far to see whether a text may stand there.
_MOST_REFERENCES: Final = 16
_LINE: Final = "\n"
#: The rule of a text and the tag that ends it.
_TEXT: Final = "text"
#: Keywords that hold schemas which a property refers to.
_DEFINITIONS: Final = ("$defs", "definitions")
#: A text and the tag that ends it; an answer that calls nothing.
_TERMINALS: Final = rf"""
text[suffix="{markup.PARAMETER_END}"]: /(?s:.*)/
ANSWER: /(?s:.*)/ & ~/(?s:.*)<{markup.DSML}(?s:.*)/
"""


@dataclass(frozen=True)
class ToolChoice:
    """What a request allows.

    Attributes:
        mode: "none": no call; "auto": the model decides; "required": at least one call.
        name: the only tool that may be called; None: any.
    """

    mode: str
    name: str | None = None


def read_tool_choice(value: object, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """Return what `tool_choice` asks for.

    Args:
        value: "none", "auto", "required", or `{"type": "function", "function": {"name": ...}}`; None is "auto" where
            there are tools.
        tools: the functions that there are.

    Raises:
        RequestError: it asks for what there is not.
    """
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if value in ("none", "auto"):
        return ToolChoice("none" if not tools else str(value))
    if value == "required":
        if not tools:
            raise RequestError("tool_choice is 'required' and there are no tools; pass some")
        return ToolChoice("required")
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            f"tool_choice is {shown(value)}, expected 'none', 'auto', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if name not in [tool["name"] for tool in tools]:
        raise RequestError(f"tool_choice names {shown(name)}, which is none of the tools; pass it among them")
    return ToolChoice("required", name)


def calls_grammar(
    tools: Sequence[Mapping[str, Any]], *, parallel: bool, required: bool, form: str | None = None
) -> str:
    """Return the Lark grammar (of llguidance) of a completion that calls tools, with arguments that fit.

    Arguments stand in the order of the schema's properties; those that are not required may be left out.

    Args:
        tools: the functions that may be called.
        parallel: whether there may be several calls.
        required: whether the completion is calls and nothing else; else it is an answer, an answer and calls, or calls.
        form: what an answer is, as the body of a rule; None: any text.
    """
    opening = f"{markup.CALLS_GAP}{markup.CALLS_START}{_LINE}"
    # the library reads a text literal by literal and goes never back, so what follows a call begins as literals that
    # differ, and not with a new line of its own
    more = " another*" if parallel else ""
    end = _literal(_LINE + markup.CALLS_END)
    if required:
        start, before = f"start: first{more} {end}", opening
    elif form is not None:
        start, before = f"start: first{more} {end} | answer\nanswer: {form}", opening
    else:
        start = f"start: opening first{more} {end} | ANSWER\nopening[suffix={_literal(opening)}]: /(?s:.*)/"
        before = ""
    rules = [start, f"first: {_heads(tools, before)}", *(_rule(*one) for one in enumerate(tools)), _TERMINALS]
    if parallel:
        rules.append(f"another: {_heads(tools, _LINE)}")
    return "\n".join(rules)


def _heads(tools: Sequence[Mapping[str, Any]], before: str) -> str:
    """Return the ways in which a call begins and goes on."""
    heads = [_literal(f'{before}{markup.INVOKE_START} name="{tool["name"]}">{_LINE}') for tool in tools]
    return " | ".join(f"{head} call_{number}" for number, head in enumerate(heads))


def _rule(number: int, tool: Mapping[str, Any]) -> str:
    """Return the rules of the arguments of one tool, to the end of the call."""
    schema = tool.get("parameters") or {}
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    required = required if isinstance(required, (list, tuple)) else ()
    rules: list[str] = []
    parts: list[str] = []
    for place, (key, value) in enumerate(properties.items()):
        rule = f"argument_{number}_{place}"
        parts.append(rule if key in required else f"{rule}?")
        rules.append(_argument(rule, str(key), value, schema))
    must = any(key in required for key in properties)
    # a call without arguments has an empty line in their place
    arguments = " ".join(parts) if must else f"({' '.join(parts)} | {_literal(_LINE)})" if parts else _literal(_LINE)
    return "\n".join([f"call_{number}: {arguments} {_literal(markup.INVOKE_END)}", *rules])


def _argument(rule: str, key: str, schema: Any, parent: Mapping[str, Any]) -> str:
    """Return the rule of one argument: a text, JSON, or either."""

    def tag(kind: str) -> str:
        return _literal(f'{markup.PARAMETER_START} name="{key}" string="{kind}">')

    end = _literal(markup.PARAMETER_END)
    texts, types = _choices(schema, parent)
    ways: list[str] = []
    if texts is not None:
        ways.append(f"{tag('true')} {texts if texts == _TEXT else f'{texts} {end}'}")
    if types is not False:
        value = dict(schema) if isinstance(schema, Mapping) else {}
        if isinstance(types, list):
            value["type"] = types
        value |= {name: parent[name] for name in _DEFINITIONS if name in parent}
        ways.append(f"{tag('false')} %json {json.dumps(value)} {end}")
    return f"{rule}: ({' | '.join(ways)}) {_literal(_LINE)}"


def _choices(schema: Any, parent: Mapping[str, Any]) -> tuple[str | None, bool | list[str]]:
    """Return what a text is that may stand here, or None, and which other types may: False, some, or True for all."""
    for _ in range(_MOST_REFERENCES):
        target = _resolved(schema, parent)
        if target is schema:
            break
        schema = target
    if not isinstance(schema, Mapping):
        return _TEXT, True
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        texts = [value for value in values if isinstance(value, str)]
        text = "(" + " | ".join(map(_literal, texts)) + ")" if texts else None
        return text, len(texts) < len(values)
    types = schema.get("type")
    if isinstance(types, str):
        types = [types]
    if not isinstance(types, list):
        options = next((schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)), None)
        if options is None:
            return _TEXT, True
        inner = [_choices(option, parent) for option in options]
        texts = [text for text, _ in inner if text is not None]
        text = _TEXT if _TEXT in texts else "(" + " | ".join(texts) + ")" if texts else None
        return text, any(other is not False for _, other in inner)
    others = [one for one in types if one != "string"]
    return (_TEXT if len(others) < len(types) else None), others if others else False


def _resolved(schema: Any, parent: Mapping[str, Any]) -> Any:
    """Return what a schema refers to within its parent, one step; itself where it refers to nothing."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    target: Any = parent
    for part in reference[2:].split("/"):
        target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    return schema if target is None else target


def _literal(text: str) -> str:
    """Return a text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)
