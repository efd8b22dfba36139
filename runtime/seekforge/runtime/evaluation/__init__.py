"""Scores of an engine on tasks of lm-evaluation-harness (extra `eval`), in this process."""
