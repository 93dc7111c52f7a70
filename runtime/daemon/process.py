"""The daemon's process from start to end: lock file, arenas, tiers, sockets, ready; then it drains and stops."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc

from moetier.runtime.config import format_bytes
from moetier.runtime.memory import exceeded
from moetier.runtime.wire.address import CARD, CONTROL_SOCKET, SOCKET, Address, DaemonCard, ServedModel, make_folder
from moetier.runtime.wire.channel import read_token
from moetier.tiers.errors import AlreadyRunningError, ConfigError
from moetier.tiers.store.atomic import write_all

from .clients import Clients
from .control_server import ControlServer
from .health import Health
from .listeners import listen_tcp, listen_unix, local_server, reflect, remote_server, server_credentials, stop
from .log import log_event
from .options import DaemonConfig
from .rpc import RemoteService, Service, describe
from .signals import got_second_stop, wait_for_stop
from .startup import open_models
from .systemd import ServiceManager

LOCK = "lock"  # file in the daemon's folder
_POLL = 0.1  # seconds between looks for a second signal
_GRACE = 0.5  # seconds for the last answers to be sent; then watches of the health are cut off

_log = logging.getLogger(__name__)


def run(config: DaemonConfig) -> None:
    """Run a daemon while the signals are blocked. Raises MoetierError if it can't start."""
    logging.getLogger("grpc._common").setLevel(logging.CRITICAL)  # a client's malformed message is no fault here
    manager = ServiceManager()
    try:
        with contextlib.ExitStack() as closing:
            with _system_errors(config.folder):
                running = _start(config, manager, closing)
            _announce(config, manager, running)
            log_event(_log, "signal", name=wait_for_stop())
            manager.stopping()
            _drain(running, config.drain)
        log_event(_log, "stopped")
    finally:
        manager.close()


@contextlib.contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """Turn OSError into ConfigError: a full or read-only disk, or too few descriptors, is no fault of ours."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError(
            f"The daemon can't start in {folder}: {error.strerror or error}{where}.",
            "Mend that, or name another folder: --folder.",
        ) from error


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Lock the folder and empty it. Yield whether a daemon was killed here.

    The kernel releases the lock when the process dies. Raises AlreadyRunningError, which names the running daemon.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise _already_running(folder, pid) from None
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # a daemon that ended has just removed the file
    try:
        os.ftruncate(descriptor, 0)
        write_all(descriptor, f"{os.getpid()}\n".encode(), 0)
        left = [p for p in folder.iterdir() if p.name in (SOCKET, CONTROL_SOCKET) or p.name.startswith(CARD)]
        for stale in left:
            stale.unlink()
        yield bool(left)
    finally:
        path.unlink(missing_ok=True)  # before the lock is released: a daemon that has opened the file tries again
        os.close(descriptor)


def _already_running(folder: Path, pid: str) -> AlreadyRunningError:
    card = DaemonCard.read(folder)
    serves = f" and serves {', '.join(model.name for model in card.models)}" if card is not None else ""
    return AlreadyRunningError(
        f"A daemon already runs in {folder}: it is process {pid or '?'}{serves}.",
        f"Use it, end it (kill {pid or 'PID'}), or start another: --folder NAME.",
    )


@dataclass(frozen=True, slots=True)
class _Running:
    """Parts of a daemon that has started."""

    clients: Clients
    health: Health
    servers: Sequence[grpc.Server]
    card: DaemonCard


def _start(config: DaemonConfig, manager: ServiceManager, closing: contextlib.ExitStack) -> _Running:
    """Start serving. ``closing`` closes everything that was opened."""
    token = read_token(config.token_file) if config.token_file is not None else None
    credentials = server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)
    make_folder(config.folder)
    was_killed = closing.enter_context(locked_folder(config.folder))
    models = open_models(config, manager, closing, was_killed=was_killed)
    clients = Clients(models, leases=config.leases, patience=config.wait)
    description = describe(models, version("moetier"))
    health = Health()

    def end_health_without_models() -> None:
        if all(model.host.fault is not None for model in models.values()):
            health.end()

    for model in models.values():
        model.when_condemned = end_health_without_models
    end_health_without_models()  # a model may have been condemned before the callback was set
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
    control = ControlServer(
        config.folder,
        admit=clients.admit,
        leave=clients.remove,
        max_clients=config.max_clients,
        version=version("moetier"),
    )
    closing.callback(control.close)
    served = tuple(
        ServedModel(model.name, model.digest, str(model.directory), model.budget_bytes) for model in models.values()
    )
    metrics = _serve_metrics(config.metrics_address, clients, health, closing) if config.metrics else ""
    card = DaemonCard(os.getpid(), version("moetier"), time.time(), served, listen, metrics)
    closing.callback((config.folder / CARD).unlink, missing_ok=True)
    card.write(config.folder)
    return _Running(clients, health, servers, card)


def _serve_metrics(address: str, clients: Clients, health: Health, closing: contextlib.ExitStack) -> str:
    """Serve the metrics, and return their HOST:PORT."""
    from .metrics import DaemonCollector, MetricsServer, registry_of

    server = MetricsServer(address, registry_of(DaemonCollector(clients.stats)), lambda: health.is_serving)
    closing.callback(server.close)
    return server.address


def _announce(config: DaemonConfig, manager: ServiceManager, running: _Running) -> None:
    """Tell systemd, the log and the process that started this one that the daemon is ready."""
    card = running.card
    models = ", ".join(model.name for model in card.models)
    budget = format_bytes(sum(model.budget_bytes for model in card.models))
    manager.ready(f"{models}: {budget}")
    log_event(
        _log,
        "ready",
        pid=card.pid,
        version=card.version,
        folder=config.folder,
        listen=card.listen or "-",
        metrics=card.metrics or "-",
        models=models,
        budget=budget,
        slots=sum(sum(model.slots.values()) for model in running.clients.models.values()),
    )
    if config.ram is not None and (there := exceeded(config.ram)) is not None:  # all experts may need less than that
        sizes = {"asked": format_bytes(config.ram.of(there.bytes)), "there": format_bytes(there.bytes)}
        log_event(_log, "more-than-there-is", logging.WARNING, **sizes, limiter=there.limiter, budget=budget)
    if without := config.unprotected:
        log_event(_log, "insecure", logging.WARNING, listen=card.listen, without=" and ".join(without))
    if card.metrics and not Address(target=card.metrics).is_loopback:
        log_event(_log, "insecure", logging.WARNING, metrics=card.metrics, without="a token and TLS")
    if config.ready_fd is not None:
        _tell_ready(config.ready_fd)


def _tell_ready(descriptor: int) -> None:
    """Write to the descriptor and close it; in place of a standard stream it then leads to /dev/null.

    Otherwise the next file would get the number of a standard stream, and be printed to.
    """
    with contextlib.suppress(OSError):  # the reader may be gone
        os.write(descriptor, b"ready\n")
    if descriptor > 2:
        os.close(descriptor)
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, descriptor)
    os.close(null)


def _drain(running: _Running, seconds: float) -> None:
    """Finish requests under way within ``seconds`` or until a second signal, then end all calls."""
    deadline = time.monotonic() + seconds
    running.clients.stop()
    running.health.end()  # from now on new calls are refused
    while not (settled := running.clients.wait(min(_POLL, deadline - time.monotonic()))):
        if time.monotonic() >= deadline or got_second_stop():
            break
    log_event(_log, "drained", finished=settled)
    running.clients.end()
    stop(running.servers, _GRACE)
