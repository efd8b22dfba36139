"""Where the user's cache is: what is kept there is only quicker to have, and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """Return `$XDG_CACHE_HOME/seekforge`, else `~/.cache/seekforge`; None for a user without a home. Not created.

    A HOME that is empty or relative is none: it would be `/`, or another folder wherever a command is run.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():  # the XDG specification ignores relative ones
        return Path(base) / "seekforge"
    if "HOME" in os.environ and not Path(os.environ["HOME"]).is_absolute():
        return None
    try:
        return Path.home() / ".cache" / "seekforge"
    except RuntimeError:  # a user id without a name, and no HOME
        return None
