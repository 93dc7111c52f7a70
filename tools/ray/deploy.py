"""Deploy an application to a running Ray cluster."""

from __future__ import annotations

import logging
import re
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from moetier.runtime.wire.address import Address
from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tools.cli.settings import API_KEY_VARIABLE
from moetier.tools.serve.keys import Keys

NAME = "moetier"  # of the application; deploying again replaces it
PROXIES = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "moetier.ray.session_ids"}  # proxies inherit the controller's


def connect(cpus: int) -> None:
    """Connect this process to the cluster. Raises ConfigError if there is none, or no node has ``cpus`` CPUs."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise ConfigError(
            "There is no Ray cluster on this machine.",
            "Start one (ray start --head --object-store-memory=200000000), or set RAY_ADDRESS.",
        ) from None
    most = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
    if cpus > most:
        raise ConfigError(
            f"A replica needs {cpus} CPUs, and no node of the cluster has more than {most}.", f"Give --threads {most}."
        )


def deploy(application: Any, host: str, port: int, *, keys: Keys | None) -> Address:
    """Deploy the application, or replace the one that an earlier call has deployed, and wait until it runs.

    Call ``connect`` first.

    Args:
        application: what ``application`` returns.
        host: address on which Ray Serve listens if it does not run yet.
        port: its port.
        keys: the API keys; None: there are none.

    Returns:
        The address on which Ray Serve listens.

    Raises:
        MoetierError: other machines can reach Ray Serve and there is no key, or the application can't run.
    """
    serve.start(http_options={"host": host, "port": port}, controller_options={"runtime_env": {"env_vars": PROXIES}})
    # if Ray Serve has run before, it stays where it is; no public name tells where (Ray 2.60)
    http_config = _get_global_client().http_config
    host = f"[{http_config.host}]" if ":" in http_config.host else http_config.host
    address = Address(target=f"{host}:{http_config.port}")
    if keys is None and not address.is_loopback:
        raise ConfigError(
            f"Other machines can reach Ray Serve at {address}, and there is no API key.",
            f"Give --api-key-file, or set {API_KEY_VARIABLE} here and for ray start; or end Ray Serve "
            "(serve shutdown), and leave out --host.",
        )
    try:
        serve.run(application, name=NAME)
    except RuntimeError as error:  # says only which deployments have failed
        states = serve.status().applications[NAME].deployments.values()
        cause = next((cause_in(state.message) for state in states if state.message), str(error))
        raise MoetierError(f"The replicas do not start. {cause}", "serve status shows the whole error.") from None
    return address


def cause_in(message: str) -> str:
    """Return the text of the last exception in ``message``, a series of tracebacks, as one line."""
    return " ".join(re.split(r"^[\w.]+(?:Error|Exception)(?:\(\w+\))?: ", message, flags=re.MULTILINE)[-1].split())
