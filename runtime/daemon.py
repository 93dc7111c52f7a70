"""The life of a daemon's process: lock, folder, leftovers, tiers, sockets, ready; then it waits to be told to end."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import grpc
from grpc_health.v1 import health

from moetier.tiers.budget import largest_budget, slots_for, smallest_budget
from moetier.tiers.errors import AlreadyRunningError, ConfigError
from moetier.tiers.host import HostTier
from moetier.tiers.manifest import Manifest
from moetier.tiers.order import DEFAULT_ORDER
from moetier.tiers.store import ExpertStore

from .address import SIDE_SOCKET, SOCKET, Address, make_folder
from .channel import read_identity, read_pem, read_token
from .config import Size, check_policy, format_bytes
from .hosted import Hosted
from .leftover import Leftover, find_leftovers
from .logfmt import say
from .memory import Available, available_memory, budget_for
from .reported import ReportedReader
from .running import FILE, DaemonCard, ServedModel
from .service import (
    Clients,
    RemoteService,
    Service,
    describe,
    health_checks,
    local_server,
    reflect,
    remote_server,
)
from .side import SideServer
from .systemd import ServiceManager

LOCK = "lock"
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_DYING = 2.0  # seconds that a killed daemon's last reads may take
_PATIENCE = 5.0  # seconds for gRPC to stop, which it promises to do at once
_POLL = 0.1  # seconds between looks for a second signal
_GRACE = 0.5  # seconds for the last answers to be sent; whoever watches the health then is cut off

_UNLIMITED = Available(1 << 62, "")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What a person asks for; ``of`` checks it."""

    directories: tuple[Path, ...]
    folder: Path
    ram: Size | None = None
    policy: str = DEFAULT_ORDER  # of ORDERS
    learn: bool = False
    listen: str = ""  # HOST:PORT; port 0: any
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    wait: float = 10.0  # seconds for a slot
    leases: int = 8  # of one client
    max_clients: int = 64
    drain: float = 10.0  # seconds
    reflection: bool = False
    ready_fd: int | None = None

    @property
    def unprotected(self) -> list[str]:
        """What its TCP address lacks by --insecure."""
        lacks = (("a token", self.token_file), ("TLS", self.tls_cert))
        return [what for what, given in lacks if given is None] if self.insecure else []

    def check(self) -> None:
        """Raises ConfigError for what contradicts itself, and for a TCP address that is not protected."""
        check_policy(self.policy)
        tls = self.tls_cert is not None
        if tls != (self.tls_key is not None):
            raise ConfigError("TLS needs a certificate and its key.", "Give both --tls-cert and --tls-key.")
        if self.tls_client_ca is not None and not tls:
            raise ConfigError("--tls-client-ca is without TLS.", "Give --tls-cert and --tls-key too.")
        if not self.listen:
            if tls or self.token_file is not None or self.insecure:
                raise ConfigError("Certificates, tokens and --insecure are for TCP.", "Give --listen HOST:PORT too.")
            return
        host, _, port = self.listen.rpartition(":")
        if not host and port.isdecimal():
            raise ConfigError(
                f"{self.listen!r} is a port alone.", f"Say on which address too: 127.0.0.1:{port}, or 0.0.0.0:{port}."
            )
        address = Address.parse(f"{host}:{'1' if port == '0' else port}")
        if address.folder is not None:
            raise ConfigError(f"{self.listen!r} is not HOST:PORT.", "Give one, such as 127.0.0.1:7070.")
        if self.insecure:
            return
        if self.token_file is None:
            raise ConfigError(
                f"{self.listen} is without a token: everybody who reaches it would be served.",
                "Give --token-file (make a token: openssl rand -hex 32), or --insecure.",
            )
        if not tls and not address.is_loopback:
            raise ConfigError(
                f"{self.listen} is without TLS, and other hosts can reach it.",
                "Give --tls-cert and --tls-key, or --insecure.",
            )


def serve(config: DaemonConfig) -> int:
    """Runs a daemon until SIGTERM or SIGINT; the exit status. Raises MoetierError where it can't start."""
    config.check()
    os.umask(0o077)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(
        OSError, ValueError
    ):  # two descriptors a client, and each shard's: as many as one may have
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    logging.getLogger("grpc._common").setLevel(logging.CRITICAL)  # what can't be parsed is answered, and no fault here
    # a thread that waits for them takes them in its turn: no handler runs in the middle of anything. They are blocked
    # before there is any other thread.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    manager = ServiceManager()
    try:
        with contextlib.ExitStack() as closing:
            with _failing(config.folder):
                running = _start(config, manager, closing)
            _announce(config, manager, running)
            _wait_for_the_end()
            manager.stopping()
            _drain(running, config.drain)
        say(_log, "stopped")
    finally:
        manager.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    return 0


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
    checks: health.HealthServicer
    servers: Sequence[grpc.Server]
    card: DaemonCard


def _start(config: DaemonConfig, manager: ServiceManager, closing: contextlib.ExitStack) -> _Running:
    """Everything that was opened is closed by ``closing``."""
    token, identity = _credentials(config)
    make_folder(config.folder)
    killed = closing.enter_context(_hold(config.folder))
    stores = _open_stores(config.directories, closing)
    models = _open_tiers(stores, config, manager, closing, dying=killed)
    clients = Clients(models, leases=config.leases, patience=config.wait)
    description = describe(models, version("moetier"))
    checks = health_checks()
    servers = [
        local_server(
            Service(clients, description), checks, clients=clients, sessions=config.max_clients, models=len(models)
        ),
    ]
    if config.listen:
        servers.append(remote_server(RemoteService(clients, description), checks, token=token, models=len(models)))
    for server in servers:
        closing.callback(_stop, server)
    if config.reflection:
        reflect(servers)
    path = config.folder / SOCKET
    closing.callback(path.unlink, missing_ok=True)
    _bind(servers[0], f"unix:{quote(str(path))}")  # a URI
    path.chmod(0o600)
    listen = _listen(servers[1], config.listen, identity) if config.listen else ""
    for server in servers:
        server.start()
    side = SideServer(
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
    card = DaemonCard(os.getpid(), version("moetier"), time.time(), served, listen)
    closing.callback((config.folder / FILE).unlink, missing_ok=True)
    card.write(config.folder)
    return _Running(models, clients, checks, servers, card)


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[bool]:
    """The folder is this process's alone, and empty. Yields whether a daemon was killed here.

    Raises AlreadyRunningError, naming the daemon that runs there.
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
        os.close(descriptor)  # a daemon that ended has just removed it
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        left = [path for path in folder.iterdir() if path.name in (SOCKET, SIDE_SOCKET) or path.name.startswith(FILE)]
        for stale in left:
            stale.unlink()
        yield bool(left)
    finally:
        path.unlink(missing_ok=True)  # before the lock is let go of: whoever has opened it looks again
        os.close(descriptor)


def _already_running(folder: Path, pid: str) -> AlreadyRunningError:
    card = DaemonCard.read(folder)
    serves = f" and serves {', '.join(model.name for model in card.models)}" if card is not None else ""
    return AlreadyRunningError(
        f"A daemon already runs in {folder}: it is process {pid or '?'}{serves}.",
        f"Use it, end it (kill {pid or 'PID'}), or start another: --folder NAME.",
    )


def _open_stores(directories: Sequence[Path], closing: contextlib.ExitStack) -> dict[str, ExpertStore]:
    """By digest, in order."""
    stores: dict[str, ExpertStore] = {}
    for directory in directories:
        store = closing.enter_context(ExpertStore.open(directory.resolve()))  # what a log says holds anywhere
        if (other := stores.get(store.manifest.digest)) is not None:
            raise ConfigError(
                f"{other.folder.parent} and {directory} hold the same experts.", "Name one of the directories."
            )
        stores[store.manifest.digest] = store
    return stores


# -- memory -----------------------------------------------------------------------------------------------------------


def _open_tiers(
    stores: Mapping[str, ExpertStore],
    config: DaemonConfig,
    manager: ServiceManager,
    closing: contextlib.ExitStack,
    *,
    dying: bool,
) -> dict[str, Hosted]:
    manifests = {digest: store.manifest for digest, store in stores.items()}
    found = find_leftovers(manifests, _passed(manager), patience=_DYING if dying else 0.0)
    with contextlib.ExitStack() as unused:
        for leftovers in found.values():
            for leftover in leftovers:
                unused.callback(leftover.arena.close)
        slots, kept = plan_slots(manifests, config.ram, available_memory(), found)
        for digest, leftover in kept.items():
            say(
                _log,
                "leftover",
                model=manifests[digest].model,
                bytes=leftover.arena.plan.nbytes,
                filled=leftover.filled,
                holder=leftover.holder,
            )
        unused.pop_all()
        for leftovers in found.values():
            for leftover in leftovers:
                if leftover not in kept.values():
                    leftover.arena.close()
    models = {}
    for digest, store in stores.items():
        began = time.monotonic()
        taken = kept.get(digest)
        arena = None if taken is None else taken.arena
        host = HostTier(ReportedReader(store), slots=slots[digest], arena=arena, policy=config.policy)
        model = Hosted(store.manifest, host, store.folder.parent, patience=config.wait, learn=config.learn)
        closing.callback(model.close)
        models[digest] = model
        _keep(model, taken, manager)
        if taken is not None:
            seconds = f"{time.monotonic() - began:.3f}"
            say(_log, "recovered", model=model.name, slots=host.recovered, of=taken.arena.plan.slots, seconds=seconds)
    for name in {name for name, _ in manager.passed} - set(map(_arena_name, models)):
        manager.forget(name)  # of a model that is served no more: it would hold its memory for ever
    manager.close()
    return models


def plan_slots(
    manifests: Mapping[str, Manifest],
    ram: Size | None,
    available: Available,
    leftovers: Mapping[str, Sequence[Leftover]],
) -> tuple[dict[str, Mapping[str, int]], dict[str, Leftover]]:
    """How many slots each model gets, and which leftovers are used for it. By digest. Raises BudgetError.

    ``ram`` in bytes is for all models together, in proportion to what they can use; a leftover of just these slots is
    used. A share of what is free, or none given, leaves the leftovers as they are, and divides the rest.
    """
    if ram is not None and ram.bytes is not None:
        slots = _divide(manifests, ram, _UNLIMITED)
        kept = {
            digest: leftover
            for digest, found in leftovers.items()
            for leftover in reversed(found)
            if leftover.arena.plan.slots_by_array == slots[digest]
        }
        if others := _without(manifests, kept):  # theirs is memory that is still to be had
            _divide(others, Size(bytes=sum(_slot_bytes(others[digest], slots[digest]) for digest in others)), available)
        return slots, kept
    kept = {digest: found[0] for digest, found in leftovers.items()}
    slots = {digest: leftover.arena.plan.slots_by_array for digest, leftover in kept.items()}
    if others := _without(manifests, kept):
        slots |= _divide(others, ram, available)
    return slots, kept


def _without(manifests: Mapping[str, Manifest], kept: Mapping[str, Leftover]) -> dict[str, Manifest]:
    return {digest: manifest for digest, manifest in manifests.items() if digest not in kept}


def _slot_bytes(manifest: Manifest, slots: Mapping[str, int]) -> int:
    return sum(manifest.layouts[array].slot_bytes * count for array, count in slots.items())


def _divide(manifests: Mapping[str, Manifest], ram: Size | None, available: Available) -> dict[str, Mapping[str, int]]:
    """The smallest budget to each model; of the rest to each in proportion to what it can still use."""
    smallest = {digest: smallest_budget(manifest) for digest, manifest in manifests.items()}
    largest = {digest: largest_budget(manifest) for digest, manifest in manifests.items()}
    least, most = sum(smallest.values()), sum(largest.values())
    budget = budget_for(ram, smallest=least, largest=most, reserve=0, available=available)
    slots = {}
    for digest, manifest in manifests.items():
        more = (budget - least) * (largest[digest] - smallest[digest]) // max(most - least, 1)
        slots[digest] = slots_for(manifest, smallest[digest] + more)
    return slots


# -- systemd ----------------------------------------------------------------------------------------------------------


def _arena_name(digest: str) -> str:
    return f"arena-{digest[:32]}"


def _passed(manager: ServiceManager) -> list[tuple[str, int]]:
    return [(f"systemd ({name})", descriptor) for name, descriptor in manager.passed]


def _keep(model: Hosted, taken: Leftover | None, manager: ServiceManager) -> None:
    """Gives the arena to systemd, for the next start; it has it already where it has passed it to this process."""
    name = _arena_name(model.digest)
    if taken is not None and taken.holder == f"systemd ({name})":
        return
    manager.forget(name)
    descriptor = model.host.export()
    try:
        manager.store(name, descriptor)
    finally:
        os.close(descriptor)


# -- sockets ----------------------------------------------------------------------------------------------------------


def _credentials(config: DaemonConfig) -> tuple[str | None, grpc.ServerCredentials | None]:
    """The token, and what TLS needs. Raises ConfigError for files that can't be used."""
    token = read_token(config.token_file) if config.token_file is not None else None
    if config.tls_cert is None or config.tls_key is None:
        return token, None
    cert, key = read_identity(config.tls_cert, config.tls_key)
    ca = read_pem(config.tls_client_ca, "client CA") if config.tls_client_ca is not None else None
    return token, grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=ca is not None)


def _listen(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    """Binds the TCP address; what it is then."""
    port = _bind(server, address, credentials)
    return f"{address.rpartition(':')[0]}:{port}"


def _bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"Can't listen on {address}: it is taken, or no address of this host.", "See who does, or name another."
        ) from error


def _stop(server: grpc.Server) -> None:
    server.stop(0).wait(_PATIENCE)


# -- the end ----------------------------------------------------------------------------------------------------------


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
        models=models,
        budget=budget,
        slots=sum(sum(model.slots.values()) for model in running.models.values()),
    )
    if without := config.unprotected:
        say(_log, "insecure", logging.WARNING, listen=card.listen, without=" and ".join(without))
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


def _wait_for_the_end() -> None:
    while True:
        name = signal.Signals(signal.sigwait(SIGNALS)).name
        if name != "SIGHUP":
            say(_log, "signal", name=name)
            return
        say(_log, "signal", name=name, note="nothing is reloaded: end it and start it again")


def _drain(running: _Running, seconds: float) -> None:
    """What was asked for is finished, within ``seconds`` or until a second signal; then all calls end."""
    deadline = time.monotonic() + seconds
    running.clients.stop()
    running.checks.enter_graceful_shutdown()  # who hears of it is refused from now on
    while not (settled := running.clients.wait(min(_POLL, deadline - time.monotonic()))):
        if time.monotonic() >= deadline or signal.sigtimedwait(SIGNALS - {signal.SIGHUP}, 0) is not None:
            break
    say(_log, "drained", finished=settled)
    running.clients.end()
    for stopped in [server.stop(_GRACE) for server in running.servers]:
        stopped.wait(_PATIENCE)
