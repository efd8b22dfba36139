"""A file of requests, a file of answers: written as they come, so that a run that was stopped goes on where it was.

The command line does the same with `seekforge run ENGINE --batch in.jsonl --output out.jsonl`, and takes lines of
OpenAI's batch form too.

    python examples/batch_file.py ENGINE IN.jsonl OUT.jsonl
"""

import json
import subprocess
import sys
from pathlib import Path


def main(engine: str, requests: str, answers: str) -> None:
    if not Path(requests).exists():
        lines = [{"id": f"q{number}", "prompt": f"Question {number}", "max_tokens": 8} for number in range(5)]
        Path(requests).write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "seekforge", "run", engine, "--batch", requests, "--output", answers]
    subprocess.run([*command, "--greedy"], check=True)
    for line in Path(answers).read_text().splitlines():
        answer = json.loads(line)
        print(answer["id"], answer["completions"][0]["token_ids"], answer["completions"][0]["finish_reason"])


if __name__ == "__main__":
    main(*sys.argv[1:])
