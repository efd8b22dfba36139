"""`seekforge dynamo`: an engine as a worker of NVIDIA Dynamo."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import command, json_option, quiet_option
from seekforge.common.cli.terminal import write_json
from seekforge.common.errors import EngineError, SeekforgeError
from seekforge.common.paths import real_path
from seekforge.runtime.cli.options import check_checkpoint, open_engine, serving_options

if TYPE_CHECKING:
    from collections.abc import Mapping


@command(
    "dynamo",
    examples=(
        "seekforge dynamo engine",
        "seekforge dynamo engine --discovery-backend file --served-model-name deepseek-v3.2",
        "seekforge dynamo engine --max-model-len 64K --num-speculative-tokens 3",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--served-model-name", metavar="NAME", help="What requests call the model. Default: the folder's name.")
@click.option("--namespace", default="dynamo", envvar="DYN_NAMESPACE", show_default=True, help="Of Dynamo's names.")
@click.option("--component", default="backend", show_default=True, help="What all replicas of this engine are called.")
@click.option(
    "--discovery-backend",
    type=click.Choice(("etcd", "file", "kubernetes", "mem")),
    default="etcd",
    envvar="DYN_DISCOVERY_BACKEND",
    show_default=True,
    help="How the frontend finds workers; file is for one machine (DYN_FILE_KV names the folder).",
)
@click.option(
    "--request-plane",
    type=click.Choice(("tcp", "nats", "http")),
    default="tcp",
    envvar="DYN_REQUEST_PLANE",
    show_default=True,
    help="How requests come.",
)
@click.option(
    "--event-plane",
    type=click.Choice(("zmq", "nats")),
    envvar="DYN_EVENT_PLANE",
    help="How the router learns of prefixes. Default: Dynamo's.",
)
@click.option("--no-kv-events", is_flag=True, help="Tell the router nothing of prefixes and loads.")
@serving_options
@click.option("--verify", is_flag=True, help="Read every byte of the engine first.")
@quiet_option
@json_option
def dynamo(
    engine: Path,
    served_model_name: str | None,
    namespace: str,
    component: str,
    discovery_backend: str,
    request_plane: str,
    event_plane: str | None,
    no_kv_events: bool,
    verify: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve ENGINE as a worker of NVIDIA Dynamo, whose frontend is started beside it.

    Several workers of one name are replicas: the frontend chooses among them. SIGTERM takes the worker from its list
    and lets requests on their way end. With --json one line on stdout says when the engine is loaded.
    """
    stages = Stages(quiet=quiet or as_json)
    opened = open_engine(engine, stages, verify=verify)
    check_checkpoint(opened, options["checkpoint"])
    name = served_model_name or real_path(engine).name

    from dynamo.common.backend import Worker, WorkerConfig  # heavy, and an extra

    from seekforge.runtime.dynamo.model_card import endpoint_types, model_card
    from seekforge.runtime.dynamo.worker import Replica, worker_class

    stages("loading")

    def ready(facts: Mapping[str, Any]) -> None:
        stages.done(f"loaded   room for {facts['max_model_len']} tokens, {facts['num_blocks']} cache blocks")
        stages.say(f"worker   {namespace}.{component}.generate serves {name}")
        if as_json:
            write_json({"model": name, "endpoint": f"{namespace}.{component}.generate", "process": os.getpid()})

    follows_blocks = options["prefix_caching"] and not no_kv_events
    card = model_card(opened.folder, opened.manifest)
    replica = Replica(
        engine=engine,
        tokenizer=opened.tokenizer,
        options=options,
        card=card,
        name=name,
        follows_blocks=follows_blocks,
        on_loading=stages.update,
        on_ready=ready,
    )
    worker = worker_class()(replica)
    config = WorkerConfig(
        namespace=namespace,
        component=component,
        model_name=str(card),
        served_model_name=name,
        endpoint_types=endpoint_types(opened.folder, name),
        discovery_backend=discovery_backend,
        request_plane=request_plane,
        event_plane=event_plane,
        enable_kv_routing=not no_kv_events,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # are Dynamo's, which would call whoever had them before
        signal.signal(number, signal.SIG_IGN)
    try:
        asyncio.run(Worker(worker, config).run())
    except SeekforgeError:
        raise
    except Exception as error:  # of Dynamo, which has no class for them all
        raise EngineError(f"NVIDIA Dynamo: {' '.join(str(error).split()) or type(error).__name__}") from error
    if worker.lost:
        raise EngineError(f"{worker.lost}; the requests on their way were lost, start the worker again")
