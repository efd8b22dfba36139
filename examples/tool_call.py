"""A conversation with a tool, through OpenAI's client: the model asks for a function, gets its result, and answers.

seekforge serve ENGINE &
python examples/tool_call.py URL [QUESTION]
"""

from __future__ import annotations

import sys

from openai import OpenAI

from seekforge.runtime.cli.chat_tools import TOOLS, call_tool  # a calculator and a clock, those of `seekforge chat`


def main(url: str, question: str = "What is 67 * 89?") -> None:
    """Ask, call what the model wants to be called, and ask again with the result."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list = [{"role": "user", "content": question}]
    asked = {"model": model, "tools": list(TOOLS), "temperature": 0, "max_tokens": 200}

    message = client.chat.completions.create(messages=messages, **asked).choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        result = call_tool(call.function.name, call.function.arguments)
        print(f"call     {call.function.name}({call.function.arguments})")
        print(f"result   {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    print("answer   ", end="", flush=True)
    for chunk in client.chat.completions.create(messages=messages, stream=True, **asked):
        for choice in chunk.choices:
            text = choice.delta.content or ""
            print("".join(one if one.isprintable() else "·" for one in text), end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
