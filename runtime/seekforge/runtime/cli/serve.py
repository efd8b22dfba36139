"""`seekforge serve`: an engine behind the interfaces of OpenAI and Anthropic."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import (
    ByteSize,
    Number,
    Whole,
    command,
    json_option,
    quiet_option,
)
from seekforge.common.cli.terminal import write_json
from seekforge.common.errors import OptionError
from seekforge.common.paths import real_path
from seekforge.common.reading import read_text
from seekforge.runtime.cli.options import check_checkpoint, open_engine, serving_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Names of this machine that no other machine reaches; a browser may be led to them by another name.
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1", "[::1]"))


def _keys(name: str, said: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Return the keys of an option and of a file with one on each line.

    Raises:
        OptionError: the file cannot be read, or a key could not be sent.
    """
    keys = list(said)
    if file is not None:
        expected = "expected a file with one key on each line"
        try:
            read = [line.strip() for line in read_text(file, most=1 << 20).split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise OptionError(f"--{name}-file {file}: {why}; {expected}") from None
        if not read:  # a server that was to have keys would be open to all
            raise OptionError(f"--{name}-file {file}: holds no key; {expected}")
        keys += read
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise OptionError(f"--{name}: a key has characters that no header can carry; expected printable ASCII")
    return tuple(keys)


@command(
    "serve",
    examples=(
        "seekforge serve engine",
        "seekforge serve engine --port 8080 --served-model-name deepseek-v3.2 --api-key-file keys.txt",
        "seekforge serve engine --max-model-len 64K --num-speculative-tokens 3",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=Whole(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--served-model-name", multiple=True, metavar="NAME", help="May be given several times. Default: the folder's."
)
@click.option("--api-key", multiple=True, envvar="SEEKFORGE_API_KEY", help="Requests need one of them.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="The same from a file, one on each line.")
@click.option(
    "--admin-key", multiple=True, envvar="SEEKFORGE_ADMIN_KEY", help="Opens what changes the engine, to its holder."
)
@click.option("--admin-key-file", type=click.Path(path_type=Path), help="The same from a file, one on each line.")
@click.option("--request-timeout", type=Number(0, above=True), metavar="SECONDS", help="An answer ends after so long.")
@click.option("--max-body-size", type=ByteSize(), default="16M", show_default=True, help="Largest body of a request.")
@click.option(
    "--drain-timeout", type=Number(0), default=30.0, show_default=True, metavar="SECONDS", help="After SIGTERM."
)
@click.option("--max-logprobs", type=Whole(-1), default=20, show_default=True, help="Most that may be asked; -1: all.")
@click.option("--cors-origin", multiple=True, metavar="ORIGIN", help="Lets pages of that origin call.  [default: none]")
@click.option("--allow-special-tokens", is_flag=True, help="Special tokens written in messages mean what they name.")
@serving_options
@click.option("--verify", is_flag=True, help="Read every byte of the engine first.")
@quiet_option
@json_option
def serve(
    engine: Path,
    host: str,
    port: int,
    served_model_name: tuple[str, ...],
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    admin_key: tuple[str, ...],
    admin_key_file: Path | None,
    request_timeout: float | None,
    max_body_size: int,
    drain_timeout: float,
    max_logprobs: int,
    cors_origin: tuple[str, ...],
    allow_special_tokens: bool,
    verify: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve ENGINE over HTTP, as OpenAI's and Anthropic's clients expect it.

    Endpoints are listed at /docs. SIGTERM and Ctrl-C let requests on their way end, a second one ends them. Each
    request is one line of JSON on stderr, without its text; with --json the address is one on stdout, as soon as
    requests are taken.
    """
    from seekforge.runtime.server.serve import bound, log_to_stderr, run  # heavy, and an extra
    from seekforge.runtime.server.settings import ServerSettings

    settings = ServerSettings(
        engine=engine,
        served_model_names=served_model_name or (real_path(engine).name,),
        api_keys=_keys("api-key", api_key, api_key_file),
        admin_keys=_keys("admin-key", admin_key, admin_key_file),
        max_body_bytes=max_body_size,
        max_logprobs=max_logprobs,
        request_timeout_s=request_timeout,
        drain_s=drain_timeout,
        cors_origins=cors_origin,
        allowed_hosts=_LOOPBACK if host.lower() in _LOOPBACK else None,
        allow_special_tokens=allow_special_tokens,
    )
    with bound(host, port) as held:
        stages = Stages(quiet=quiet or as_json)
        opened = open_engine(engine, stages, verify=verify)
        check_checkpoint(opened, options["checkpoint"])
        stages("loading")

        def ready(facts: Mapping[str, Any]) -> None:
            where = held.getsockname()
            url = f"http://{_address(where[0])}:{where[1]}"
            stages.done(f"loaded   room for {facts['max_model_len']} tokens, {facts['num_blocks']} cache blocks")
            stages.say(f"serving  {url}")
            if as_json:
                write_json({"url": url, "models": settings.served_model_names, "max_model_len": facts["max_model_len"]})

        log_to_stderr(logging.WARNING if quiet else logging.INFO)
        run(settings, options, held, on_loading=stages.update, on_ready=ready)


def _address(host: str) -> str:
    return f"[{host}]" if ":" in host else host
