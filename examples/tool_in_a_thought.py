"""A tool in the middle of a thought: the model thinks, calls, is told the result, thinks on, and answers.

Its thought goes back with its call, so that it knows what it wanted; behind the next user message it is left out.

python examples/tool_in_a_thought.py ENGINE [QUESTION]
"""

import sys

from seekforge import LLM, SamplingParams
from seekforge.runtime.cli.chat_tools import TOOLS, call_tool  # a calculator and a clock, those of `seekforge chat`


def main(engine: str, question: str = "What is 67 * 89?") -> None:
    messages: list = [{"role": "user", "content": question}]
    params = SamplingParams(max_tokens=160, temperature=0)
    with LLM(engine) as llm:
        for _ in range(4):  # calls as often as it likes, up to a point
            (output,) = llm.chat(messages, params, tools=TOOLS, chat_template_kwargs={"thinking": True})
            message = output.outputs[0].message
            messages.append(message)
            if message.reasoning_content:
                print(f"thought  {' '.join(message.reasoning_content.split())}")
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                result = call_tool(call.name, call.arguments)
                print(f"call     {call.name}({call.arguments})")
                print(f"result   {result}")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        print(f"answer   {' '.join((message.content or '').split())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
