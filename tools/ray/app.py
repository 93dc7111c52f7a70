"""Build the application of Ray Serve."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetier.runtime.machine.threads import usable_cpus
from moetier.tiers.errors import ConfigError
from moetier.tools.serve.options import check_packages

from .options import parsed

DEPLOYMENT = "moetier"  # the name under which a configuration file of Ray Serve can change what is set here
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
ANSWER_SECONDS = 600.0  # longest time in which a replica that is to end may finish its answers
# the rest of what `moetier ray` parses is not for replicas, which restart if what they are given changes
NOT_OF_REPLICAS = ("min_replicas", "max_replicas", "host", "port", "command", "run", "configured", "by_name")


def app(args: Mapping[str, Any] | None = None, /, **options: Any) -> Any:
    """Build an application of Ray Serve: replicas of `moetier serve`, and a daemon on each node that has replicas.

    It is an application builder, too: ``serve run moetier.ray:app model=DIR ram=64GiB``, or ``import_path:
    moetier.ray:app`` and ``args`` in a configuration file.

    Args:
        args: options in a dictionary, as Ray Serve gives them to a builder.
        options: the options of `moetier ray` by name: ``model``, the only required one, ``ram``, ``threads``,
            ``max_replicas`` and so on. Values are those of the command line, or numbers, True and False.

    Returns:
        An application for ``ray.serve.run``.

    Raises:
        MoetierError: an option is unknown or invalid, or a package is missing.
    """
    return application(parsed({**(args or {}), **options}))


# Ray Serve accepts only builders with one parameter
app.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("args", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
)


def application(arguments: argparse.Namespace) -> Any:
    """Return the application with the options of ``add_application_arguments``.

    Raises ConfigError if a package is missing.
    """
    try:
        from ray import serve
    except ImportError:  # Ray can be installed without Ray Serve
        raise ConfigError(
            "Ray Serve is not installed.", 'In the repository of moetier, run: pip install ".[ray]"'
        ) from None
    check_packages("Ray Serve")
    from .replica import Replica

    options = {name: value for name, value in vars(arguments).items() if name not in NOT_OF_REPLICAS}
    options["threads"] = threads = arguments.threads or usable_cpus()
    for name in ("api_key_file", "api_keys", "kv_cache_dir", "store_cache"):
        options[name] = None if options[name] is None else Path(options[name]).absolute()
    parallel, queue, least = arguments.parallel, arguments.queue, arguments.min_replicas
    deployment = serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=parallel + min(parallel, queue),  # further ones go to the next replica
        max_queued_requests=max(queue, 1),  # 0 is not allowed
        backpressure_config={"status_code": 429},
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": max(least, arguments.max_replicas or 1),
            "target_ongoing_requests": parallel,
        },
        request_router_config={"request_router_class": ROUTER},
        graceful_shutdown_timeout_s=ANSWER_SECONDS,
    )
    return deployment(serve.ingress()(Replica)).bind(options)
