"""What Ray Serve deploys: `build_app`, which a Serve config names, makes an application of one deployment of replicas.

A replica has a placement group with a bundle for each rank of its engine: the first one is the replica's own, which
starts the other ranks on theirs (`ranks`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from seekforge.common.errors import OptionError
from seekforge.common.paths import real_path
from seekforge.common.records import Record, RecordError, at_least
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime.ray.placement import bundles_of

DEPLOYMENT: Final = "seekforge"
#: Variables with the keys of a server: arguments of an application can be read in Ray's dashboard.
API_KEY, ADMIN_KEY = "SEEKFORGE_API_KEY", "SEEKFORGE_ADMIN_KEY"
#: Seconds between two looks at a replica, and until one that does not answer counts as lost.
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2, 30


class ApplicationArguments(Record):
    """The `args` of an application in a Serve config.

    Attributes:
        engine: the engine's folder, which every node has under this path.
        served_model_name: what requests call the model; None: the folder's name.
        num_replicas: replicas; None: one, or what the config says of the deployment.
        threads: CPU threads of each rank, which are the cores that Ray reserves.
        max_model_len, max_batch_size, kv_cache_memory, max_waiting, deterministic, prefix_caching: as `LLM` has them.
        num_speculative_tokens, checkpoint, self_check: as `LLM` has them.
        drain_s: seconds that requests on their way have to end when a replica is taken away.
    """

    engine: str
    served_model_name: str | None = None
    num_replicas: Annotated[int, at_least(1)] | None = None
    threads: Annotated[int, at_least(1)] = 1
    max_model_len: int | None = None
    max_batch_size: int | None = None
    kv_cache_memory: int | None = None
    max_waiting: int = 1024
    deterministic: bool = False
    prefix_caching: bool = True
    num_speculative_tokens: int = 0
    checkpoint: str | None = None
    self_check: bool = True
    drain_s: float = 30.0


#: Arguments that `LLM` has too.
_ENGINE_OPTIONS: Final = (
    "threads",
    "max_model_len",
    "max_batch_size",
    "kv_cache_memory",
    "max_waiting",
    "deterministic",
    "prefix_caching",
    "num_speculative_tokens",
    "checkpoint",
    "self_check",
)


def build_app(args: Mapping[str, Any]) -> Any:
    """Return the application of an engine; a Serve config has this function as `import_path`.

    Args:
        args: see `ApplicationArguments`.

    Raises:
        OptionError: an argument is wrong.
        EngineError: it is no engine.
    """
    from ray import serve

    try:
        arguments = ApplicationArguments.model_validate(dict(args))
    except RecordError as error:
        raise OptionError(f"args of the Ray Serve application: {error}") from None
    options = deployment_options(arguments)
    num_ranks = len(options["placement_group_bundles"])
    replica = serve.deployment(name=DEPLOYMENT, **options)(_replica_class(arguments, num_ranks))
    return replica.bind()


def deployment_options(arguments: ApplicationArguments) -> dict[str, Any]:
    """Return the options of a deployment whose replicas have an engine each.

    Raises:
        EngineError: it is no engine.
    """
    bundles = bundles_of(load_manifest(Path(arguments.engine)), arguments.threads)
    return {
        "max_ongoing_requests": arguments.max_waiting,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": arguments.drain_s,
        "ray_actor_options": {"num_cpus": bundles[0]["CPU"], "num_gpus": bundles[0]["GPU"]},
        "placement_group_bundles": bundles,
        "placement_group_strategy": "STRICT_PACK" if len(bundles) == 1 else "PACK",
        **({} if arguments.num_replicas is None else {"num_replicas": arguments.num_replicas}),
    }


def _replica_class(arguments: ApplicationArguments, num_ranks: int) -> Any:
    """Return the class of the actors."""
    from ray import serve

    def made() -> Any:  # Ray asks whether it is a function
        return make_replica_app(arguments, num_ranks)

    @serve.ingress(made)
    class Replica:
        """An engine with the server's endpoints."""

        def check_health(self) -> None:
            """Raise where the engine is gone; Ray then starts another replica."""
            self.app.check()  # pyright: ignore[reportAttributeAccessIssue]  # of the class that `ingress` makes

    return Replica


def make_replica_app(arguments: ApplicationArguments, num_ranks: int = 1) -> Any:
    """Return the application of one replica, whose engine has so many ranks; called in its process."""
    from seekforge.runtime.ray.ranks import Ranks
    from seekforge.runtime.ray.replica import ReplicaApp
    from seekforge.runtime.server.settings import ServerSettings

    engine = Path(arguments.engine)
    settings = ServerSettings(
        engine=engine,
        served_model_names=(arguments.served_model_name or real_path(engine).name,),
        api_keys=tuple(os.environ.get(API_KEY, "").split()),
        admin_keys=tuple(os.environ.get(ADMIN_KEY, "").split()),
        drain_s=arguments.drain_s,
    )
    options = {name: getattr(arguments, name) for name in _ENGINE_OPTIONS}
    ranks = Ranks(engine, num_ranks) if num_ranks > 1 else None
    return ReplicaApp(settings, options, end=functools.partial(os._exit, 1), ranks=ranks)
