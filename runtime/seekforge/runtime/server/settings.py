"""What a server is told when it starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server speaks.

    Attributes:
        engine: the folder of the engine; its tokenizer is read here too.
        served_model_names: names that requests may call the model by; the first is what answers say.
        api_keys: one of them is needed for all but what tells of the server (/health, /ready, /metrics, /docs,
            /openapi.json, the page); none: no key is needed.
        admin_keys: one of them is needed for the endpoints that change the engine; none: there are no such endpoints.
        max_body_bytes: largest body of a request.
        max_logprobs: most likely tokens of which log-probabilities may be asked at each place; -1: all.
        max_requests: most requests that are on their way; more are refused with 429.
        request_timeout_s: after this time an answer ends with what it has; None sets no bound.
        read_timeout_s: a body that is not there after so long is given up.
        write_timeout_s: a client that takes nothing for so long is dropped.
        drain_s: after SIGTERM requests on their way have so long to end.
        allowed_hosts: names that requests may be sent to, in lower case; None: any.
        allowed_hosts: Collection[str] | None = None
    cors_origins: origins that browsers may call from; none by default.
        allow_special_tokens: text of messages may hold the text of special tokens and mean them.
        enable_page: answer / with the page.
    """

    engine: Path
    served_model_names: Sequence[str]
    api_keys: Sequence[str] = ()
    admin_keys: Sequence[str] = ()
    max_body_bytes: int = 16 << 20
    max_logprobs: int = 20
    max_requests: int = 1024
    request_timeout_s: float | None = None
    read_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    drain_s: float = 30.0
    allowed_hosts: Collection[str] | None = None
    cors_origins: Sequence[str] = ()
    allow_special_tokens: bool = False
    enable_page: bool = True
