"""What docs/runtime.md promises of text with drafts, where roundings flip: FP8 numerics and integer weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmarks.drafts import differences, generate, random_prompts

PROMPTS = random_prompts(48, vocab_size=1000, seed=1)
TOKENS = 24


@pytest.mark.parametrize("drafts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_texts_with_drafts_part_only_where_rounding_decides(tiny_engines: dict[str, Path], drafts: int) -> None:
    """Prompts are drawn until some part. Each parts at a choice that was close, and deterministic mode keeps it."""
    parted = []
    for first in range(0, len(PROMPTS), 8):
        prompts = PROMPTS[first : first + 8]
        plain = generate(tiny_engines["fp8"], prompts, max_tokens=TOKENS)
        found = differences(plain, generate(tiny_engines["fp8"], prompts, max_tokens=TOKENS, drafts=drafts))
        assert all(one.gap < 2 for one in found), found  # nats; most other tokens are further away
        parted += [prompts[one.prompt] for one in found]
        if parted:
            break
    assert parted, "no text parted: the promise for fp8 can be as strong as that for exact numerics"
    plain = generate(tiny_engines["fp8"], parted, max_tokens=TOKENS, deterministic=True)
    drafted = generate(tiny_engines["fp8"], parted, max_tokens=TOKENS, deterministic=True, drafts=drafts)
    assert differences(plain, drafted) == []
