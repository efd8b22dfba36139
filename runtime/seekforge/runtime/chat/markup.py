"""The tokens and tags of a DeepSeek-V3.2 conversation (spec §8.1, §8.2)."""

from __future__ import annotations

from typing import Final

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
#: What a prompt cannot be written without.
CONTROL_TOKENS: Final = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)

#: Begins the name of every tag about tools; it is no token of its own.
DSML: Final = "｜DSML｜"
CALLS_START: Final = f"<{DSML}function_calls>"
CALLS_END: Final = f"</{DSML}function_calls>"
#: What parts calls from the text before them.
CALLS_GAP: Final = "\n\n"
INVOKE_START: Final = f"<{DSML}invoke"
INVOKE_END: Final = f"</{DSML}invoke>"
PARAMETER_START: Final = f"<{DSML}parameter"
PARAMETER_END: Final = f"</{DSML}parameter>"
