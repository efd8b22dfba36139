"""Text as it is made: each step's piece is printed at once, and the whole request is in the last one.

python examples/stream.py ENGINE [PROMPT]
"""

import sys

from seekforge import LLM, SamplingParams


def main(engine: str, prompt: str = "Hello") -> None:
    params = SamplingParams(max_tokens=32, temperature=0.7, seed=1)  # the same seed gives the same text
    with LLM(engine) as llm:
        for delta in llm.stream(prompt, params):
            print(delta.text, end="", flush=True)
            if delta.output is not None:
                completion = delta.output.outputs[0]
                print(f"\n{len(completion.token_ids)} tokens, finish: {completion.finish_reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
