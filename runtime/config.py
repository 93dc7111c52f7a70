"""How much of the machine a process may use: one frozen value, checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypedDict

from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS
from moetier.tiers.errors import ConfigError

from .threads import check_threads

SPECULATE = ("auto", "off", "always")
LOOK_AHEAD = 1  # layers: from further away more is guessed in vain (tests/measurements/speculation.py)
DEFAULT_CONTEXT = 4096  # tokens
NONE = "none"  # as a daemon: None, for whoever has only text
AUTO = "auto"  # as a daemon: one that runs and serves this very store, if there is one

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*|%)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Size:
    """An amount of memory: bytes, or a share of what there is."""

    bytes: int | None = None
    share: Fraction | None = None

    @classmethod
    def parse(cls, text: str | int) -> Size:
        """``"6GiB"`` (1024-based, as is a bare ``"6G"``), ``"6GB"`` (1000-based), ``"50%"``, or a number of bytes.

        Raises ConfigError.
        """
        match = _SIZE.fullmatch(str(text))
        unit = match.group(2).lower() if match else "?"
        number = Fraction(match.group(1)) if match else Fraction(0)
        if unit == "%" and number > 100:
            raise ConfigError(f"{text!r} is more than there is.", 'Give a share of at most 100%, or a size: "6GiB".')
        if unit == "%" and number > 0:
            return cls(share=number / 100)
        if unit not in _UNITS or number <= 0:
            raise ConfigError(f"{text!r} is not an amount of memory.", 'Give a size such as "6GiB", or a share: "50%".')
        return cls(bytes=int(number * _UNITS[unit]))

    def of(self, total: int) -> int:
        """In bytes, where ``total`` bytes are what a share is taken of."""
        return self.bytes if self.bytes is not None else int((self.share or 0) * total)


class TierOptions(TypedDict, total=False):
    """Keyword arguments of ``register``: those of ``load`` that ``from_pretrained`` is not told."""

    ram: str | int | None
    device_memory: str | int | None
    daemon: str | None
    credentials: Credentials | None
    policy: str
    speculate: str
    look_ahead: int
    prefetch: int | None
    learn: bool
    context: int
    exact: bool
    threads: int | None


@dataclass(frozen=True, slots=True)
class TierConfig:
    """Budgets of the tiers of one process. None means the default: 80 % of what the trunk and the KV cache leave."""

    ram: Size | None = None  # of host records; a share is of what the trunk and the KV cache leave
    device_memory: Size | None = None  # of device records; a share is of what they leave on the device
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", ...
    find_daemon: bool = False  # use one of this host's that serves the store, if there is one
    daemons: tuple[Address, ...] = ()  # these, and none else; () and not find_daemon: experts are this process's own
    credentials: Credentials = field(default_factory=Credentials)
    policy: str = DEFAULT_ORDER  # of ORDERS: who is evicted from the host tier, and from the device's
    speculate: str = "auto"  # of SPECULATE
    look_ahead: int = LOOK_AHEAD  # layers
    prefetch: int | None = None  # experts of a block, promoted on a guess; None: as many as are worth it
    learn: bool = False  # keep which experts are used most, and begin with those of earlier runs
    context: int = DEFAULT_CONTEXT  # tokens for whose keys, values and early outputs budgets leave room
    exact: bool = False  # compute bit for bit as transformers' eager experts do with the decoded weights
    threads: int | None = None  # to compute with; None: as many as this process may use CPUs

    @classmethod
    def of(
        cls,
        *,
        ram: str | int | None = None,
        device_memory: str | int | None = None,
        device: str = "auto",
        daemon: str | None = None,
        credentials: Credentials | None = None,
        policy: str = DEFAULT_ORDER,
        speculate: str = "auto",
        look_ahead: int = LOOK_AHEAD,
        prefetch: int | None = None,
        learn: bool = False,
        context: int = DEFAULT_CONTEXT,
        exact: bool = False,
        threads: int | None = None,
    ) -> TierConfig:
        """From what a person writes; raises ConfigError. ``daemon`` is "auto", "none" (or None), or addresses separated
        by commas."""
        _check_type(int | str | None, 'a size such as "6GiB", a share: "50%", or a number of bytes', ram=ram)
        _check_type(int | str | None, "a size, a share or a number of bytes", device_memory=device_memory)
        _check_type(str, "a text", device=device, policy=policy, speculate=speculate)
        _check_type(str | None, '"auto", None, or addresses separated by commas', daemon=daemon)
        _check_type(Credentials | None, "moetier's Credentials", credentials=credentials)
        _check_type(int, "a whole number", look_ahead=look_ahead, context=context)
        _check_type(int | None, "a whole number", prefetch=prefetch)
        _check_type(bool, "True or False", learn=learn, exact=exact)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ConfigError(f"{device!r} is not a device.", 'Give "auto", "cpu", "cuda" or "cuda:N".')
        check_policy(policy)
        if speculate not in SPECULATE:
            raise ConfigError(f"{speculate!r} is no way to speculate.", f"Give one of {', '.join(SPECULATE)}.")
        if not 1 <= look_ahead <= 8:
            raise ConfigError(f"A look-ahead of {look_ahead} layers.", "Give 1 to 8.")
        if prefetch is not None and prefetch < 1:
            raise ConfigError(f"A prefetch of {prefetch} experts.", 'Give 1 or more, or speculate="off".')
        if context < 1:
            raise ConfigError(f"A context of {context} tokens.", "Give 1 or more.")
        check_threads(threads)
        addresses = [] if daemon in (None, NONE, AUTO) else daemon.split(",")
        if len(addresses) > 1 and not all(addresses):
            raise ConfigError(f"{daemon!r} has a comma too many.", "Name daemons with one comma between two.")
        daemons = tuple(map(Address.parse, addresses))
        if len(set(daemons)) != len(daemons):
            raise ConfigError(f"{daemon!r} names a daemon twice.", "Name each once.")
        found = cls(
            ram=None if ram is None else Size.parse(ram),
            device_memory=None if device_memory is None else Size.parse(device_memory),
            device=device,
            find_daemon=daemon == AUTO,
            daemons=daemons,
            credentials=credentials or Credentials(),
            policy=policy,
            speculate=speculate,
            look_ahead=look_ahead,
            prefetch=prefetch,
            learn=learn,
            context=context,
            exact=exact,
            threads=threads,
        )
        asked = {"`ram`": ram is not None, "`policy`": policy != DEFAULT_ORDER, "`learn`": learn}
        if found.mapped is not None and any(asked.values()):
            raise ConfigError(
                f"The experts are the daemon's, {found.mapped}: its memory is what holds them.",
                f"Give {' and '.join(name for name in asked if asked[name])} to the daemon, and not here.",
            )
        if found.credentials != Credentials() and not any(address.target for address in daemons):
            raise ConfigError(
                "A token, certificates or their absence are for daemons of other hosts, and none is named.",
                "Name one with `daemon` (HOST:PORT), or leave them out.",
            )
        return found

    @property
    def mapped(self) -> Address | None:
        """The one daemon of this host that was asked for: its memory is mapped, and no budget is needed here."""
        return self.daemons[0] if len(self.daemons) == 1 and self.daemons[0].folder else None


def _check_type(kind: Any, wanted: str, **values: object) -> None:
    """Raises ConfigError for a value of another type. True and False are no numbers, though Python takes them so."""
    for name, value in values.items():
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"`{name}` is {value!r}.", f"Give {wanted}.")


def check_policy(name: str) -> None:
    """Raises ConfigError for what is no policy."""
    if name not in ORDERS:
        raise ConfigError(f"{name!r} is no policy of eviction.", f"Give one of {', '.join(ORDERS)}.")


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
