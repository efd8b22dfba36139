"""Many prompts at once: texts and token ids in one call, computed together, with what each of them cost.

python examples/generate.py ENGINE
"""

import sys

from seekforge import LLM, SamplingParams

PROMPTS = ["Hello", "Once upon a time", [5, 6, 7]]  # text is encoded as it is; ids are taken as they are


def main(engine: str) -> None:
    params = SamplingParams(max_tokens=16, temperature=0)
    with LLM(engine) as llm:  # verifies the files and repeats the self-check first
        for output in llm.generate(PROMPTS, params):
            completion = output.outputs[0]
            print(f"{output.prompt_token_ids} -> {completion.token_ids} ({completion.finish_reason})")
            print(f"    {completion.text!r}")
            cost = output.metrics
            print(f"    {output.usage.total_tokens} tokens, {cost.cached_tokens} of the prompt found in the cache")


if __name__ == "__main__":
    main(*sys.argv[1:])
