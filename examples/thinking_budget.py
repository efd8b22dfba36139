"""A thought that may take so many tokens and no more: it is ended, and the model answers with what it knows by then.

python examples/thinking_budget.py ENGINE [QUESTION]
"""

import sys

from seekforge import LLM, SamplingParams


def main(engine: str, question: str = "What is 467 + 385?") -> None:
    messages = [{"role": "user", "content": question}]
    budgets = (4, 16, None)  # None sets no bound
    params = [SamplingParams(max_tokens=128, temperature=0, thinking_token_budget=budget) for budget in budgets]
    with LLM(engine) as llm:
        outputs = llm.chat([messages] * len(budgets), params, chat_template_kwargs={"thinking": True})
        for budget, output in zip(budgets, outputs, strict=True):
            message = output.outputs[0].message
            thought = " | ".join(message.reasoning_content.splitlines())
            print(f"budget {budget or 'none'}: {thought!r} -> {message.content!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
