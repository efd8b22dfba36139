"""What a checkpoint's `encoding/` folder says of tools: a text that the model was trained with.

The wording is part of the model, and released as part of a Python file. No such file is executed: its text is read as
a literal, to tell whether a checkpoint says something else than what is encoded here.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

from seekforge.common.reading import SETTINGS_BYTES, read_text

#: Where released checkpoints have it.
ENCODING_FILE: Final = "encoding/encoding_dsv32.py"

# DeepSeek-V3.2, encoding/encoding_dsv32.py, Copyright (c) 2023 DeepSeek, MIT license.
# Byte for byte, line ends included.
TOOLS_PREAMBLE: Final = """\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml_token}function_calls>" block like the following as part of your reply to the user:
<{dsml_token}function_calls>
<{dsml_token}invoke name="$FUNCTION_NAME">
<{dsml_token}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml_token}parameter>
...
</{dsml_token}invoke>
<{dsml_token}invoke name="$FUNCTION_NAME2">
...
</{dsml_token}invoke>
</{dsml_token}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<{dsml_token}function_calls>
...
</{dsml_token}function_calls>

<function_results>
...
</function_results>

{thinking_start_token}...thinking about results{thinking_end_token}

Here are the functions available in JSONSchema format:
<functions>
{tool_schemas}
</functions>
"""  # noqa: E501
#: What only this text has.
_MARK: Final = "{tool_schemas}"


def preamble_in(source: str) -> str | None:
    """Return the text about tools that a Python file holds as a literal; None: it holds none.

    Raises:
        ValueError: the file is no Python.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"is no Python file ({type(error).__name__})") from None
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return next((text for text in texts if _MARK in text), None)


def preamble_difference(folder: Path) -> str | None:
    """Return a sentence on what the `encoding/` folder of a checkpoint says otherwise; None: nothing, or no file.

    Args:
        folder: the folder of a checkpoint.
    """
    path = folder / ENCODING_FILE
    if not path.is_file():
        return None
    try:
        text = preamble_in(read_text(path, most=SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        return f"{path}: cannot be read ({error}); chats are encoded as DeepSeek-V3.2's are"
    if text is None:
        return f"{path}: holds no text about tools; chats are encoded as DeepSeek-V3.2's are"
    if text == TOOLS_PREAMBLE:
        return None
    at = next((i for i, (a, b) in enumerate(zip(text, TOOLS_PREAMBLE)) if a != b), min(len(text), len(TOOLS_PREAMBLE)))
    line = TOOLS_PREAMBLE.count("\n", 0, at) + 1
    return (
        f"{path}: its text about tools differs from DeepSeek-V3.2's from line {line} on "
        f"({len(text):,} characters, expected {len(TOOLS_PREAMBLE):,}); chats are encoded with DeepSeek-V3.2's"
    )
