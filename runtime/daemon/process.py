"""The life of a daemon's process: lock, folder, leftovers, tiers, sockets, ready; then it waits to be told to end."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc

from moetier.runtime.config import format_bytes
from moetier.runtime.memory import exceeded
from moetier.runtime.wire.address import CARD, SOCKET, Address, DaemonCard, ServedModel, make_folder
from moetier.runtime.wire.channel import read_token
from moetier.tiers.errors import ConfigError

from .clients import Clients
from .control_server import ControlServer
from .health import Health
from .hold import hold
from .listeners import listen_tcp, listen_unix, local_server, reflect, remote_server, server_credentials, stop
from .log import say
from .model import Hosted
from .options import DaemonConfig
from .rpc import RemoteService, Service, describe
from .signals import is_told_again, wait_for_the_end
from .startup import open_models
from .systemd import ServiceManager

_POLL = 0.1  # seconds between looks for a second signal
_GRACE = 0.5  # seconds for the last answers to be sent; whoever watches the health then is cut off

_log = logging.getLogger(__name__)


def live(config: DaemonConfig) -> None:
    """From start to end, while the signals are blocked. Raises MoetierError where it can't start."""
    logging.getLogger("grpc._common").setLevel(logging.CRITICAL)  # what can't be parsed is answered, and no fault here
    manager = ServiceManager()
    try:
        with contextlib.ExitStack() as closing:
            with _failing(config.folder):
                running = _start(config, manager, closing)
            _announce(config, manager, running)
            say(_log, "signal", name=wait_for_the_end())
            manager.stopping()
            _drain(running, config.drain)
        say(_log, "stopped")
    finally:
        manager.close()


@contextlib.contextmanager
def _failing(folder: Path) -> Iterator[None]:
    """What the system refuses is no fault of ours: a full or read-only disk, too few descriptors."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError(
            f"The daemon can't start in {folder}: {error.strerror or error}{where}.",
            "Mend that, or name another folder: --folder.",
        ) from error


@dataclass(frozen=True, slots=True)
class _Running:
    models: Mapping[str, Hosted]
    clients: Clients
    health: Health
    servers: Sequence[grpc.Server]
    card: DaemonCard


def _start(config: DaemonConfig, manager: ServiceManager, closing: contextlib.ExitStack) -> _Running:
    """Everything that was opened is closed by ``closing``."""
    token = read_token(config.token_file) if config.token_file is not None else None
    credentials = server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)
    make_folder(config.folder)
    killed = closing.enter_context(hold(config.folder))
    models = open_models(config, manager, closing, dying=killed)
    clients = Clients(models, leases=config.leases, patience=config.wait)
    description = describe(models, version("moetier"))
    health = Health()

    def end_health_without_models() -> None:
        if all(model.host.fault is not None for model in models.values()):
            health.end()

    for model in models.values():
        model.when_condemned = end_health_without_models
    end_health_without_models()  # what was condemned before has told nobody
    servers = [
        local_server(
            Service(clients, description), health, clients=clients, sessions=config.max_clients, models=len(models)
        ),
    ]
    if config.listen:
        servers.append(remote_server(RemoteService(clients, description), health, token=token, models=len(models)))
    closing.callback(stop, servers)
    if config.reflection:
        reflect(servers)
    path = config.folder / SOCKET
    closing.callback(path.unlink, missing_ok=True)
    listen_unix(servers[0], path)
    listen = listen_tcp(servers[1], config.listen, credentials) if config.listen else ""
    for server in servers:
        server.start()
    side = ControlServer(
        config.folder,
        admit=clients.admit,
        leave=clients.leave,
        max_clients=config.max_clients,
        version=version("moetier"),
    )
    closing.callback(side.close)
    served = tuple(
        ServedModel(model.name, model.digest, str(model.directory), model.budget_bytes) for model in models.values()
    )
    metrics = _serve_metrics(config.metrics_address, clients, health, closing) if config.metrics else ""
    card = DaemonCard(os.getpid(), version("moetier"), time.time(), served, listen, metrics)
    closing.callback((config.folder / CARD).unlink, missing_ok=True)
    card.write(config.folder)
    return _Running(models, clients, health, servers, card)


def _serve_metrics(address: str, clients: Clients, health: Health, closing: contextlib.ExitStack) -> str:
    """Where they are then."""
    from .metrics import DaemonCollector, registry_of
    from .metrics_server import MetricsServer

    server = MetricsServer(address, registry_of(DaemonCollector(clients.stats)), lambda: health.is_serving)
    closing.callback(server.close)
    return server.address


def _announce(config: DaemonConfig, manager: ServiceManager, running: _Running) -> None:
    card = running.card
    models = ", ".join(model.name for model in card.models)
    budget = format_bytes(sum(model.budget_bytes for model in card.models))
    manager.ready(f"{models}: {budget}")
    say(
        _log,
        "ready",
        pid=card.pid,
        version=card.version,
        folder=config.folder,
        listen=card.listen or "-",
        metrics=card.metrics or "-",
        models=models,
        budget=budget,
        slots=sum(sum(model.slots.values()) for model in running.models.values()),
    )
    if config.ram is not None and (there := exceeded(config.ram)) is not None:  # all experts fit, which is less
        sizes = {"asked": format_bytes(config.ram.of(there.bytes)), "there": format_bytes(there.bytes)}
        say(_log, "more-than-there-is", logging.WARNING, **sizes, limiter=there.limiter, budget=budget)
    if without := config.unprotected:
        say(_log, "insecure", logging.WARNING, listen=card.listen, without=" and ".join(without))
    if card.metrics and not Address(target=card.metrics).is_loopback:
        say(_log, "insecure", logging.WARNING, metrics=card.metrics, without="a token and TLS")
    if config.ready_fd is not None:
        _tell(config.ready_fd)


def _tell(descriptor: int) -> None:
    """That it is ready; and closes it, but so that no other file gets the number of a standard stream: somebody may
    print to that."""
    with contextlib.suppress(OSError):  # whoever wanted to know is gone
        os.write(descriptor, b"ready\n")
    if descriptor > 2:
        os.close(descriptor)
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, descriptor)
    os.close(null)


def _drain(running: _Running, seconds: float) -> None:
    """What was asked for is finished, within ``seconds`` or until a second signal; then all calls end."""
    deadline = time.monotonic() + seconds
    running.clients.stop()
    running.health.end()  # who hears of it is refused from now on
    while not (settled := running.clients.wait(min(_POLL, deadline - time.monotonic()))):
        if time.monotonic() >= deadline or is_told_again():
            break
    say(_log, "drained", finished=settled)
    running.clients.end()
    stop(running.servers, _GRACE)
