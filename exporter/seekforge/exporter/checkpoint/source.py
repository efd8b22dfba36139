"""Where a checkpoint comes from: a local folder, or a repository of the Hugging Face hub (`formats/checkpoint/hub.py`).

The three sibling checkpoints (V3.2-Exp, V3.2, V3.2-Speciale) have one architecture and are the same to us.
"""

from __future__ import annotations

from seekforge.formats.checkpoint.hub import headers, parse_repo, resolve

__all__ = ["headers", "parse_repo", "resolve"]
