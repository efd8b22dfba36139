"""What text may be: one of some words, JSON of a schema, no word of a list; and how likely each choice was.

Structured outputs need the extra `guided`.

    python examples/choose.py ENGINE
"""

import json
import sys

from seekforge import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green", "blue"]}, "warm": {"type": "boolean"}},
    "required": ["color", "warm"],
    "additionalProperties": False,
}


def main(engine: str) -> None:
    choice = StructuredOutputsParams(choice=["red", "green", "blue"])
    schema = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    with LLM(engine) as llm:
        (output,) = llm.generate("A color: ", SamplingParams(max_tokens=16, structured_outputs=choice, logprobs=1))
        completion = output.outputs[0]
        print(f"choice: {completion.text}")
        for token in completion.logprobs or ():
            print(f"    token {token.token_id}: log-probability {token.logprob:.2f}, rank {token.rank}")
        (output,) = llm.generate("As JSON: ", SamplingParams(max_tokens=64, structured_outputs=schema, seed=3))
        print(f"json: {json.loads(output.outputs[0].text)}")
        (output,) = llm.generate(
            "Several: ", SamplingParams(n=3, max_tokens=6, temperature=1.2, top_p=0.9, bad_words=["the"], seed=3)
        )
        for completion in output.outputs:
            print(f"sample {completion.index}: {completion.text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
