"""The page at /, and the facts that it shows. One file, no foreign host; its policy lets nothing else run."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp

from seekforge.runtime.server.context import Call


@functools.cache
def _page() -> tuple[str, str]:
    """Return the page and its content security policy, which names its style and script by their digests."""
    text = (files("seekforge.runtime.server.endpoints") / "page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inner = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inner is not None
        return "'sha256-" + base64.b64encode(hashlib.sha256(inner[1].encode()).digest()).decode() + "'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


async def page(call: Call) -> ASGIApp:
    """Return the page."""
    text, policy = _page()
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


async def engine(call: Call) -> ASGIApp:
    """Return what engine is served, and how full its cache is."""
    context = call.context
    facts, now = context.client.facts, await context.client.call("metrics")
    check = facts["self_check"]
    usable = max(facts["num_blocks"] - 1, 1)
    return JSONResponse(
        {
            "model": context.model_name,
            "target": facts["target"],
            "digest": facts["digest"],
            "self_check": None if check is None else {"largest_difference": check[0], "tolerance": check[1]},
            "max_model_len": facts["max_model_len"],
            "max_batch_size": facts["max_batch_size"],
            "num_blocks": facts["num_blocks"],
            "block_size": facts["block_size"],
            "kv_cache_usage": 1 - now["num_free_blocks"] / usable,
            "num_requests_running": now["num_running"],
            "num_requests_waiting": now["num_waiting"],
            "paused": now["paused"],
        }
    )
