"""The daemon's process from start to end: lock file, arenas, tiers, sockets, report of readiness, drain, stop."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import grpc

from moetier.runtime.machine.memory import exceeded
from moetier.runtime.wire.address import CARD, CONTROL_SOCKET, SOCKET, Address, DaemonCard, ServedModel, make_folder
from moetier.runtime.wire.channel import read_token
from moetier.tiers.errors import AlreadyRunningError, ConfigError
from moetier.tiers.store.atomic import write_all
from moetier.tiers.text import format_bytes

from .clients import Clients
from .control_server import ControlServer
from .daemon_config import DaemonConfig
from .log import log_event
from .server import bind, local_server, reflect, remote_server, server_credentials, stop
from .startup import open_models, open_stores
from .systemd import ServiceManager

LOCK = "lock"  # file in the daemon's folder
_STOP = {signal.SIGTERM, signal.SIGINT}
_POLL = 0.1  # seconds between checks for a second signal
_GRACE = 0.5  # seconds for the last answers to be sent; then open health watches are cancelled

_log = logging.getLogger(__name__)


def run(config: DaemonConfig) -> None:
    """Run a daemon until SIGTERM or SIGINT. The signals must be blocked. Raises MoetierError if it can't start."""
    # this logger reports malformed messages of clients, which are not faults of the daemon
    logging.getLogger("grpc._common").setLevel(logging.CRITICAL)
    manager = ServiceManager()
    try:
        with contextlib.ExitStack() as closing:
            try:
                clients, servers, card = _start(config, manager, closing)
            except OSError as error:  # such as a full or read-only disk, or too few descriptors
                where = f" ({error.filename})" if error.filename else ""
                raise ConfigError(
                    f"The daemon can't start in {config.folder}: {error.strerror or error}{where}.",
                    "Remove the cause, or name another folder with --folder.",
                ) from error
            _announce(config, manager, card, clients)
            while (name := signal.Signals(signal.sigwait({*_STOP, signal.SIGHUP})).name) == "SIGHUP":
                log_event(_log, "signal", name=name, note="nothing is reloaded: restart the daemon for other options")
            log_event(_log, "signal", name=name)
            manager.stopping()
            _drain(clients, config.drain)
            stop(servers, _GRACE)
        log_event(_log, "stopped")
    finally:
        manager.close()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Lock a daemon's folder, and remove the files that a killed daemon has left there. Yield whether there were any.

    The kernel releases the lock when the process dies. Raises AlreadyRunningError, which names the running daemon, if
    the folder is locked.
    """
    path = folder / LOCK
    while (descriptor := _lock(path)) is None:
        pass  # a daemon that ended has just removed the file: lock a new one
    try:
        os.ftruncate(descriptor, 0)
        write_all(descriptor, f"{os.getpid()}\n".encode(), 0)
        left = [p for p in folder.iterdir() if p.name in (SOCKET, CONTROL_SOCKET) or p.name.startswith(CARD)]
        for stale in left:
            stale.unlink()
        yield bool(left)
    finally:
        # removed before the lock is released, so that a daemon that has just opened this file tries again
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Lock the file at ``path``, and return its descriptor; None if the file was removed meanwhile.

    Raises AlreadyRunningError if a daemon has locked it.
    """
    with contextlib.ExitStack() as closing:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        closing.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            card = DaemonCard.read(path.parent)
            serves = f" and serves {', '.join(model.name for model in card.models)}" if card is not None else ""
            raise AlreadyRunningError(
                f"A daemon already runs in {path.parent}: it is process {pid or '?'}{serves}.",
                f"Use it, end it (kill {pid or 'PID'}), or start another daemon with --folder NAME.",
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                closing.pop_all()
                return descriptor
    return None


def _start(
    config: DaemonConfig, manager: ServiceManager, closing: contextlib.ExitStack
) -> tuple[Clients, list[grpc.Server], DaemonCard]:
    """Open the models, and start all servers. ``closing`` will close everything that is opened here."""
    token = read_token(config.token_file) if config.token_file is not None else None
    credentials = server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)  # checked before all else
    stores = open_stores(config.directories, closing)  # before the folder is made, as a model may be missing
    make_folder(config.folder)
    was_killed = closing.enter_context(locked_folder(config.folder))
    models = open_models(config, stores, manager, closing, was_killed=was_killed)
    clients = Clients(models, max_leases=config.max_leases, timeout=config.slot_timeout)
    servers, listen = _start_servers(config, clients, token, credentials, closing)
    control = ControlServer(
        config.folder,
        register=clients.register,
        unregister=clients.unregister,
        max_clients=config.max_clients,
        version=version("moetier"),
    )
    closing.callback(control.close)
    served = tuple(
        ServedModel(model.name, model.digest, str(model.location), model.budget_bytes) for model in models.values()
    )
    metrics = _start_metrics(config, clients, closing)
    card = DaemonCard(os.getpid(), version("moetier"), time.time(), served, listen, metrics)
    closing.callback((config.folder / CARD).unlink, missing_ok=True)
    card.write(config.folder)
    return clients, servers, card


def _start_servers(
    config: DaemonConfig,
    clients: Clients,
    token: str | None,
    credentials: grpc.ServerCredentials | None,
    closing: contextlib.ExitStack,
) -> tuple[list[grpc.Server], str]:
    """Start the gRPC servers. Return them, and the address for other hosts; "" if they can't connect."""
    servers = [local_server(clients, sessions=config.max_clients)]
    if config.listen:
        servers.append(remote_server(clients, token=token))
    closing.callback(stop, servers)
    if config.reflection:
        for server in servers:
            reflect(server)
    path = config.folder / SOCKET
    closing.callback(path.unlink, missing_ok=True)
    bind(servers[0], f"unix:{quote(str(path))}")  # gRPC takes a URI
    path.chmod(0o600)
    listen = ""
    if config.listen:
        port = bind(servers[1], config.listen, credentials)  # for port 0, the port that was chosen
        listen = f"{config.listen.rpartition(':')[0]}:{port}"
    for server in servers:
        server.start()
    return servers, listen


def _start_metrics(config: DaemonConfig, clients: Clients, closing: contextlib.ExitStack) -> str:
    """Start the server of metrics, if there is to be one. Return its address, or ""."""
    if not config.metrics:
        return ""
    from .metrics import DaemonCollector, MetricsServer, registry_of

    registry = registry_of(DaemonCollector(clients.stats))
    server = MetricsServer(config.metrics_address, registry, lambda: clients.is_serving)
    closing.callback(server.close)
    return server.address


def _announce(config: DaemonConfig, manager: ServiceManager, card: DaemonCard, clients: Clients) -> None:
    """Report to systemd, to the log and to the process that started the daemon that it is ready."""
    models = ", ".join(model.name for model in card.models)
    budget = format_bytes(sum(model.budget_bytes for model in card.models))
    slots = sum(sum(model.slots.values()) for model in clients.models.values())
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
        slots=slots,
    )
    if sys.stderr.isatty():
        said = f"{models}: ready, with room for {slots:,} experts ({budget})"
        print(f"{said}. Commands find it by themselves; Ctrl-C ends it.", file=sys.stderr, flush=True)
    # only a warning, as all experts together may need less
    if config.ram is not None and (whole := exceeded(config.ram)) is not None:
        sizes = {"asked": format_bytes(config.ram.of(whole.bytes)), "there": format_bytes(whole.bytes)}
        log_event(_log, "more-than-there-is", logging.WARNING, **sizes, limiter=whole.limiter, budget=budget)
    if without := config.unprotected:
        log_event(_log, "insecure", logging.WARNING, listen=card.listen, without=" and ".join(without))
    if card.metrics and not Address(target=card.metrics).is_loopback:
        log_event(_log, "insecure", logging.WARNING, metrics=card.metrics, without="a token and TLS")
    if config.ready_fd is not None:
        _tell_ready(config.ready_fd)


def _tell_ready(descriptor: int) -> None:
    """Write a line to ``descriptor`` and close it. A standard stream is redirected to /dev/null instead of closed.

    If a standard stream were closed, the next file would get its number, and printed text would go to that file.
    """
    with contextlib.suppress(OSError):  # the reader may be gone
        os.write(descriptor, b"ready\n")
    if descriptor > 2:
        os.close(descriptor)
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, descriptor)
    os.close(null)


def _drain(clients: Clients, seconds: float) -> None:
    """Wait until no request is open, ``seconds`` are over or a second signal comes; then end all streams."""
    deadline = time.monotonic() + seconds
    clients.refuse_new()
    while not (finished := clients.wait(min(_POLL, deadline - time.monotonic()))):
        if time.monotonic() >= deadline or signal.sigtimedwait(_STOP, 0) is not None:
            break
    log_event(_log, "drained", finished=finished)
    clients.end()
