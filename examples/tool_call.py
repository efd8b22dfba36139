"""A conversation with a tool, through OpenAI's client: the model asks for a function, gets its result, and answers.

seekforge serve ENGINE &
python examples/tool_call.py URL
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI

WEATHER = {"Oslo": "rain, 7 °C", "Rome": "sun, 24 °C"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": list(WEATHER)}},
                "required": ["city"],
            },
        },
    }
]


def main(url: str, key: str = "none") -> None:
    """Ask, call what the model wants to be called, and ask again with the result."""
    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    model = client.models.list().data[0].id

    messages: list = [{"role": "user", "content": "How is the weather in Oslo?"}]
    # a call is demanded here, so that a model with random weights makes one as well; leave it out for a trained one
    first = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        seed=0,
    )
    message = first.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        city = json.loads(call.function.arguments)["city"]
        print(f"call     {call.function.name}({call.function.arguments})")
        print(f"result   {WEATHER[city]}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": WEATHER[city]})

    print("answer   ", end="", flush=True)
    stream = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, max_tokens=24, seed=0, stream=True
    )
    for chunk in stream:
        for choice in chunk.choices:
            text = choice.delta.content or ""
            print("".join(one if one.isprintable() else "·" for one in text), end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
