"""Where daemons are: folders of Unix sockets that their user alone may enter, or HOST:PORT; what clients show there."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.errors import ConfigError, RefusedError

DEFAULT_NAME = "default"
SOCKET = "grpc.sock"  # the gRPC service
SIDE_SOCKET = "side.sock"  # descriptors and credentials
_NAME = re.compile(r"[\w-][\w.-]*")
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})")
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]")
_LONGEST = 107  # bytes of the path of a Unix socket (unix(7))


@dataclass(frozen=True, slots=True)
class Address:
    """One daemon: a ``folder`` of Unix sockets on this host, or ``target``, HOST:PORT."""

    folder: Path | None = None
    target: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """``"NAME"`` (a folder of that name beneath ``runtime_folder()``), ``"/a/folder"`` or ``"./a/folder"``,
        ``"HOST:PORT"`` or ``"[IPV6]:PORT"``. Raises ConfigError."""
        if "/" in text:
            return cls.of(Path(text))
        if _NAME.fullmatch(text):
            return cls.of(runtime_folder() / text)
        match = _HOST_PORT.fullmatch(text)
        if match and 0 < int(match.group(2)) < 65536:
            return cls(target=text)
        raise ConfigError(
            f"{text!r} is no address of a daemon.",
            'Give a name ("default"), the path of a daemon\'s folder, or "HOST:PORT".',
        )

    @classmethod
    def of(cls, folder: Path) -> Address:
        """Raises ConfigError where the path is too long for a socket."""
        folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would hide a symbolic link
        if len(os.fsencode(folder / SIDE_SOCKET)) > _LONGEST:
            raise ConfigError(
                f"The path {folder} is too long for a Unix socket.",
                f"Choose a folder of at most {_LONGEST - len(SIDE_SOCKET) - 1} bytes.",
            )
        return cls(folder=folder)

    @property
    def is_loopback(self) -> bool:
        """Of a TCP address: whether packets stay on this host."""
        return _LOOPBACK.fullmatch(self.target.rpartition(":")[0]) is not None

    def __str__(self) -> str:
        return self.target or str(self.folder)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows a daemon on another host, and by what it knows it. All are paths of files."""

    token_file: Path | None = None  # of the bearer token, in one line
    ca: Path | None = None  # PEM; by default the system's roots
    cert: Path | None = None  # PEM; of a client that the daemon wants to know, with its key
    key: Path | None = None
    insecure: bool = False  # no TLS


def runtime_folder() -> Path:
    """Where the daemons of this user are found: ``$XDG_RUNTIME_DIR/moetier``, or a folder of the user's in /tmp
    (XDG Base Directory Specification 0.8)."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_absolute():
        return Path(base) / "moetier"
    return Path(tempfile.gettempdir()) / f"moetier-{os.getuid()}"


def check_folder(folder: Path) -> None:
    """Raises RefusedError unless the folder is this user's, closed to all others, and reached through no symbolic link
    that somebody else could have laid. FileNotFoundError where there is none."""
    for part in (folder, *folder.parents):
        try:
            found = part.lstat()
        except FileNotFoundError:
            raise
        except OSError as error:  # a file on the way, or another user's folder
            raise RefusedError(f"{folder} can't be reached: {error.strerror}.", "Use a folder of your own.") from None
        if part == folder:
            if not stat.S_ISDIR(found.st_mode):
                raise RefusedError(f"{folder} is no folder.", "Name the folder of a daemon.")
            if found.st_uid != os.getuid():
                raise RefusedError(f"{folder} belongs to another user.", "Use a folder of your own.")
            if found.st_mode & 0o077:
                raise RefusedError(f"{folder} is open to other users.", f"Close it: chmod 700 {folder}")
        elif stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.getuid()):
            raise RefusedError(f"{part} is a symbolic link of another user.", "Use a folder without it.")
        elif found.st_uid not in (0, os.getuid()) and not found.st_mode & stat.S_ISVTX:
            raise RefusedError(f"{part} belongs to another user, who could exchange what is in it.", "Use another.")


def make_folder(folder: Path) -> None:
    """Makes the folder of a daemon, mode 0700, where it is missing, and checks it. Raises ConfigError where it can't be
    made, and as ``check_folder`` does."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # whatever it is, it is checked
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"The folder {folder} can't be made: {error.strerror}.", "Name another: --folder.") from None
    check_folder(folder)
