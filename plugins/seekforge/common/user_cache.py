"""Where the user's cache is: what is kept there is only quicker to have, and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """Return `$XDG_CACHE_HOME/seekforge`, else `~/.cache/seekforge`; None for a user without a home. Not created."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():  # the XDG specification ignores relative ones
        return Path(base) / "seekforge"
    try:
        return Path.home() / ".cache" / "seekforge"
    except RuntimeError:  # a user id without a name, and no HOME
        return None
