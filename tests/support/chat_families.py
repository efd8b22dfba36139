"""Chat templates of families that are talked to by their checkpoint's template, and calls as their models write them.

Written here, in the manner of the released ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

#: As GLM's: arguments are an object, and `enable_thinking` decides.
GLM = """[gMASK]<sop>
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|user|>{{ m.content }}
{%- elif m.role == 'tool' %}<|observation|><tool_response>{{ m.content }}</tool_response>
{%- else %}<|assistant|><think></think>{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}
{%- for k, v in call.function.arguments.items() -%}
<arg_key>{{ k }}</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>
{%- endfor %}</tool_call>{% endfor %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{{- '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}"""
#: As DeepSeek-V3.1's: arguments are text, and `thinking` decides.
V3 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- else %}<｜Assistant｜></think>{{ m.content }}
{%- for call in m.tool_calls or [] -%}
<｜tool▁call▁begin｜>{{ call.function.name + '<｜tool▁sep｜>' + call.function.arguments }}<｜tool▁call▁end｜>
{%- endfor %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
#: As Kimi-K2's: a call is written with its id, which its result names.
KIMI = """{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_assistant|>assistant<|im_middle|>{{ m.content }}
{%- if m.get('tool_calls') -%}<|tool_calls_section_begin|>
{%- for call in m.tool_calls -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.arguments }}<|tool_call_end|>
{%- endfor %}<|tool_calls_section_end|>{% endif %}
{%- else %}<|im_{{ 'system' if m.role == 'tool' else m.role }}|>{{ m.role }}<|im_middle|>
{%- if m.role == 'tool' %}## Return of {{ m.tool_call_id }}
{% endif %}{{ m.content }}
{%- endif %}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""

ASK: Final[list[Any]] = [{"role": "user", "content": "q"}]


@dataclass(frozen=True)
class ChatFamily:
    """What an end-to-end test needs of a family.

    Attributes:
        model_type: as config.json names it.
        template: the template of its checkpoint.
        answer: words and a call of `f` with `{"a": 1}`, as its models write them.
        shown: what the next prompt has of that call.
        result: what the next prompt has of the result "it rains".
        tokens: what its vocabulary has beside DeepSeek's.
    """

    model_type: str
    template: str
    answer: str
    shown: str
    result: str
    tokens: tuple[str, ...] = ()


_V3_CALL: Final = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
_KIMI_CALL: Final = '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
_GLM_CALL: Final = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
CHAT_FAMILIES: Final[dict[str, ChatFamily]] = {
    "glm": ChatFamily(
        "glm_moe_dsa",
        GLM,
        f"I look.{_GLM_CALL}",
        _GLM_CALL,
        "<tool_response>it rains</tool_response>",
        ("<tool_call>",),
    ),
    "deepseek_v3": ChatFamily(
        "deepseek_v3",
        V3,
        f"I look.<｜tool▁calls▁begin｜>{_V3_CALL}<｜tool▁calls▁end｜>",
        _V3_CALL,
        "<｜tool▁output▁begin｜>it rains<｜tool▁output▁end｜>",
    ),
    "kimi": ChatFamily(
        "deepseek_v3",
        KIMI,
        f"I look.<|tool_calls_section_begin|>{_KIMI_CALL}<|tool_calls_section_end|>",
        _KIMI_CALL,
        "## Return of functions.f:0\nit rains",
        ("<|tool_call_begin|>", "<|tool_call_end|>"),
    ),
}


def add_tokens(source: Path, tokens: tuple[str, ...], out: Path) -> None:
    """Write a tokenizer.json anew with further special tokens."""
    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.add_tokens([AddedToken(text, special=True) for text in tokens])
    out.unlink(missing_ok=True)
    tokenizer.save(str(out))


def conversation(message: Any, call_id: str) -> list[Any]:
    """Return the conversation that goes on from an answer with the result of its call."""
    return [*ASK, message, {"role": "tool", "tool_call_id": call_id, "content": "it rains"}]
