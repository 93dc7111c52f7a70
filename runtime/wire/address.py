"""Addresses of daemons, credentials of clients, and cards, by which processes find the daemons of this host.

The address of a daemon on this machine is the folder of its Unix sockets, which only the daemon's user may enter. The
address of a daemon on another host is HOST:PORT. dns:///HOST:PORT means several daemons: one at each IP address of the
name HOST. The folder also holds the daemon's card, daemon.json.
"""

# ruff: noqa: RUF009 - each call of these functions returns a new field

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from moetier.tiers.errors import ConfigError, RefusedError, UnavailableError
from moetier.tiers.options import file_option, option, options_of
from moetier.tiers.ownership import private_fault
from moetier.tiers.redaction import redacted

DEFAULT_NAME = "default"
SOCKET = "grpc.sock"  # the gRPC service
CONTROL_SOCKET = "side.sock"  # gives clients a session id and the arena's descriptor
CARD = "daemon.json"
DIGEST_CHARS = 12  # characters of a digest that are shown: enough to tell two stores of one model apart
REMOTE = "daemons on other hosts"  # title of a group of options
_DNS = "dns:///"
_NAME = re.compile(r"[\w-][\w.-]*")
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/@\[\]]+):(\d{1,5})")
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]")
_MAX_PATH_BYTES = 107  # longest path of a Unix socket (unix(7))


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a daemon: a ``folder`` of Unix sockets on this machine, or a ``target`` HOST:PORT.

    With ``is_dns_name`` it stands for several daemons: one at each IP address of the target's host, at that port.
    ``tls_name`` is the name that the daemon's certificate must have, if it is not the target's host.
    """

    folder: Path | None = None
    target: str = ""
    is_dns_name: bool = False
    tls_name: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse the address of a daemon.

        ``"NAME"`` means the folder NAME in ``runtime_folder()``. A text with a slash is the path of a folder:
        ``"/a/folder"``, ``"./a/folder"``. A daemon on another host is ``"HOST:PORT"`` or ``"[IPV6]:PORT"``, and
        ``"dns:///HOST:PORT"`` stands for several. Raises ConfigError for any other text, and for a path that is too
        long for a Unix socket.
        """
        if "/" in text and "://" not in text:
            return cls.of(Path(text))
        if _NAME.fullmatch(text):
            return cls.of(runtime_folder() / text)
        if (match := _HOST_PORT.fullmatch(text.removeprefix(_DNS))) and 0 < int(match.group(2)) < 65536:
            return cls(target=match.group(), is_dns_name=text.startswith(_DNS))
        if "@" in text:  # what stands before it may be a password
            raise ConfigError(
                "The address of a daemon has user information (such as USER:PASSWORD@), which moetier does not accept.",
                "Give HOST:PORT, and the file of a token with `credentials.token_file`.",
            )
        raise ConfigError(
            f"{redacted(text)!r} is not the address of a daemon.",
            'Give a name ("default"), the path of a daemon\'s folder, "HOST:PORT", or "dns:///HOST:PORT".',
        )

    @classmethod
    def of(cls, folder: Path) -> Address:
        """Return the address of the daemon in ``folder``.

        Raises ConfigError if the path is too long for a Unix socket.
        """
        folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would hide a symbolic link
        if len(os.fsencode(folder / CONTROL_SOCKET)) > _MAX_PATH_BYTES:
            raise ConfigError(
                f"The path {folder} is too long for a Unix socket.",
                f"Choose a folder whose path has at most {_MAX_PATH_BYTES - len(CONTROL_SOCKET) - 1} bytes.",
            )
        return cls(folder=folder)

    def resolve(self) -> list[Address]:
        """Return the address of each daemon of a DNS name, sorted by IP address as text.

        Asks the system's resolver, which may take seconds. Raises UnavailableError if it can't resolve the name now.
        """
        host, _, port = self.target.rpartition(":")
        host = host.strip("[]")
        try:
            infos = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise UnavailableError(
                f"The name {host} can't be resolved: {getattr(error, 'strerror', None) or error}.",
                "Check the name, and the DNS server of this machine.",
            ) from None
        ips = sorted({str(place[0]) for *_, place in infos})
        targets = [f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips]
        return [Address(target=target, tls_name=host.removesuffix(".")) for target in targets]

    @property
    def is_loopback(self) -> bool:
        """Whether packets to this TCP address stay on this machine."""
        return _LOOPBACK.fullmatch(self.target.rpartition(":")[0]) is not None

    def __str__(self) -> str:
        return f"{_DNS if self.is_dns_name else ''}{self.target}" or str(self.folder)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files with which a client and a daemon on another host identify themselves to each other."""

    token_file: Path | None = file_option("file that holds the daemon's token in one line", REMOTE)
    ca: Path | None = file_option(
        "PEM file of the CA that signed the daemon's certificate (default: the system's CAs)", REMOTE, name="tls_ca"
    )
    cert: Path | None = file_option("PEM file of this client's certificate", REMOTE, name="tls_cert")
    key: Path | None = file_option("PEM file of the private key of --tls-cert", REMOTE, name="tls_key")
    insecure: bool = option(False, "connect without TLS", group=REMOTE, is_setting=False)


CREDENTIALS = options_of(Credentials)


def runtime_folder() -> Path:
    """Return the parent of this user's daemon folders: ``$XDG_RUNTIME_DIR/moetier``, or a folder in /tmp.

    Source: XDG Base Directory Specification 0.8.
    """
    if (base := os.environ.get("XDG_RUNTIME_DIR")) and Path(base).is_absolute():
        return Path(base) / "moetier"
    return Path(tempfile.gettempdir()) / f"moetier-{os.getuid()}"


def check_folder(folder: Path) -> None:
    """Check that a daemon's folder belongs to this user, and that no other user can enter or replace it.

    Raises RefusedError if the check fails, and FileNotFoundError if the folder does not exist.
    """
    try:
        fault = private_fault(folder)
    except FileNotFoundError:
        raise
    except OSError as error:  # a parent is a file, or closed to this user
        raise RefusedError(f"{folder} can't be reached: {error.strerror}.", "Use a folder of your own.") from None
    if fault is not None:
        raise RefusedError(*fault)


def make_folder(folder: Path) -> None:
    """Create a daemon's folder with mode 0700 if it is missing, and check it.

    Raises ConfigError if it can't be created, and RefusedError as ``check_folder`` does.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # whatever is there is checked below
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"The folder {folder} can't be created: {error.strerror}.", "Name another folder with --folder."
        ) from None
    check_folder(folder)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model on a daemon's card."""

    name: str
    digest: str
    directory: str
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class DaemonCard:
    """A daemon's card: a file from which other processes learn that the daemon runs, and what it serves.

    The daemon writes the card when it is ready and removes it when it ends. A daemon that was killed leaves its card
    behind, so only a connection shows whether the daemon still runs.
    """

    pid: int
    version: str  # version of moetier that the daemon runs
    started_unix: float
    models: tuple[ServedModel, ...]
    listen: str = ""  # HOST:PORT; "" if the daemon does not listen on TCP
    metrics: str = ""  # HOST:PORT; "" if the daemon serves no metrics

    def write(self, folder: Path) -> None:
        """Write the card into ``folder`` atomically: no reader sees a part of it."""
        new = folder / f"{CARD}.{os.getpid()}"
        new.write_text(json.dumps(asdict(self)))
        new.chmod(0o600)
        new.replace(folder / CARD)

    @classmethod
    def read(cls, folder: Path) -> DaemonCard | None:
        """Return the card in ``folder``; None if there is none, or if another version wrote it.

        Raises RefusedError if ``check_folder`` does.
        """
        try:
            check_folder(folder)
            card = json.loads((folder / CARD).read_bytes())
            return cls(models=tuple(ServedModel(**model) for model in card.pop("models")), **card)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def known_daemons() -> dict[Address, DaemonCard]:
    """Return a dictionary from addresses of daemons to their cards, for all folders in ``runtime_folder()``."""
    cards = {}
    for folder in sorted(path for path in runtime_folder().glob("*") if path.is_dir()):
        with contextlib.suppress(RefusedError):  # another user's folder
            if (card := DaemonCard.read(folder)) is not None:
                cards[Address.of(folder)] = card
    return cards


def daemons_serving(digest: str) -> list[Address]:
    """Return the addresses of the daemons whose card lists the store ``digest``. A listed daemon may be dead."""
    return [a for a, card in known_daemons().items() if any(model.digest == digest for model in card.models)]
