"""`seekforge ray`: replicas of an engine behind the server's interfaces, under Ray Serve."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import Number, Whole, command, json_option, quiet_option
from seekforge.common.cli.terminal import write_json
from seekforge.common.errors import EngineError
from seekforge.common.paths import real_path
from seekforge.runtime.cli.options import check_checkpoint, open_engine, serving_options

#: Seconds between two looks at the application.
_LOOK_S = 1.0


@command(
    "ray",
    examples=(
        "seekforge ray engine --num-replicas 2",
        "seekforge ray engine --address auto --host 0.0.0.0 --served-model-name deepseek-v3.2",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--num-replicas", type=Whole(1, 4096), default=1, show_default=True, help="Engines that share requests.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=Whole(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option("--address", help="A Ray cluster; auto is that of this machine. Default: one is started here.")
@click.option("--served-model-name", metavar="NAME", help="What requests call the model. Default: the folder's name.")
@click.option(
    "--drain-timeout",
    type=Number(0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="For requests on their way when a replica is taken away.",
)
@serving_options
@click.option("--verify", is_flag=True, help="Read every byte of the engine first.")
@quiet_option
@json_option
def ray(
    engine: Path,
    num_replicas: int,
    host: str,
    port: int,
    address: str | None,
    served_model_name: str | None,
    drain_timeout: float,
    verify: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve replicas of ENGINE with Ray Serve, at the endpoints of `seekforge serve`.

    Keys are what SEEKFORGE_API_KEY and SEEKFORGE_ADMIN_KEY say where Ray was started. With --json the address is one
    line on stdout, as soon as requests are taken. A Serve config that names
    seekforge.runtime.ray.application:build_app does the same on a cluster that runs already.
    """
    stages = Stages(quiet=quiet or as_json)
    opened = open_engine(engine, stages, verify=verify)
    check_checkpoint(opened, options["checkpoint"])

    import ray as ray_library  # heavy, and an extra
    from ray import serve

    from seekforge.runtime.ray.application import build_app

    stages("loading")
    checkpoint = options["checkpoint"]
    app = build_app(
        {
            **options,
            "engine": str(real_path(engine)),
            "checkpoint": None if checkpoint is None else str(real_path(checkpoint)),
            "threads": options["threads"] or 1,
            "served_model_name": served_model_name or real_path(engine).name,
            "num_replicas": num_replicas,
            "drain_s": drain_timeout,
        }
    )
    # without an address Ray would look for a cluster of this machine, which may have ended
    ray_library.init(
        address=address or "local", log_to_driver=not (quiet or as_json), include_dashboard=None if address else False
    )
    try:
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(app, name="seekforge", route_prefix="/")
        except RuntimeError as error:
            raise EngineError(f"Ray Serve could not start the replicas: {error}") from None
        url = f"http://{host}:{port}"
        stages.done(f"loaded   {num_replicas} replicas")
        stages.say(f"serving  {url}")
        if as_json:
            write_json({"url": url, "num_replicas": num_replicas})
        while True:
            time.sleep(_LOOK_S)
    finally:
        serve.shutdown()
        ray_library.shutdown()
