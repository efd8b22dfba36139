"""The same question answered at once and after a thought; the thought comes apart from the answer.

python examples/thinking.py ENGINE [QUESTION]
"""

import sys

from seekforge import LLM, SamplingParams


def main(engine: str, question: str = "What is 467 + 385?") -> None:
    params = SamplingParams(max_tokens=128, temperature=0)
    with LLM(engine) as llm:
        for thinking in (False, True):
            (output,) = llm.chat(
                [{"role": "user", "content": question}], params, chat_template_kwargs={"thinking": thinking}
            )
            message = output.outputs[0].message
            print(f"thinking {'on' if thinking else 'off'}: {len(output.outputs[0].token_ids)} tokens")
            if message.reasoning_content:
                print(f"thought:  {' | '.join(message.reasoning_content.splitlines())}")
            print(f"answer:   {message.content!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
