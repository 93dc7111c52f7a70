"""Options of the tiers of one process, declared once and checked once."""

# ruff: noqa: RUF009 - each call of option returns a new field

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict, Unpack

from moetier.runtime.device_names import check_device, device_values
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES
from moetier.tiers.errors import ConfigError
from moetier.tiers.options import COUNT, Number, Option, named, option, options_of, read_all
from moetier.tiers.source import LOADERS

DEFAULT_SHARE = 0.8  # share of the free memory: the page cache, other programs and a longer context need the rest
GROUP_SHARE = 0.95  # the share in a control group with a limit: other programs are few, and experts need no page cache
KV_SHARE = Fraction(1, 4)  # of the memory that the trunk leaves, for keys and values
PREFILL_TOKENS = 4096  # most tokens of a prompt that are computed together
NO_DAEMON = "none"  # value of the option `daemon` that means None where only a text can be given
AUTO = "auto"  # value of the option `daemon`: use a running daemon that serves this store, if there is one

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*|%)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Size:
    """Amount of memory: either a number of ``bytes``, or a ``share`` (0 to 1) of the memory that is available."""

    bytes: int | None = None
    share: Fraction | None = None

    @classmethod
    def parse(cls, text: str | int) -> Size:
        """Parse ``"6GiB"`` or ``"6G"`` (both 1024-based), ``"6GB"`` (1000-based), ``"50%"``, or a number of bytes.

        Raises ConfigError for any other text, for 0 and for a share of more than 100 %.
        """
        match = _SIZE.fullmatch(str(text))
        unit = match.group(2).lower() if match else "?"
        number = Fraction(match.group(1)) if match else Fraction(0)
        if unit == "%" and number > 100:
            raise ConfigError(f"{text!r} is more than 100%.", 'Give a share of at most 100%, or a size: "6GiB".')
        if unit == "%" and number > 0:
            return cls(share=number / 100)
        if unit not in _UNITS or number <= 0:
            raise ConfigError(f"{text!r} is not an amount of memory.", 'Give a size such as "6GiB", or a share: "50%".')
        return cls(bytes=int(number * _UNITS[unit]))

    def of(self, total: int) -> int:
        """Return the size in bytes. A share is a share of ``total`` bytes."""
        return self.bytes if self.bytes is not None else int((self.share or 0) * total)


@dataclass(frozen=True, slots=True)
class DaemonChoice:
    """The source of a process's experts: its own store (the default), or daemons."""

    find: bool = False  # use a daemon of this machine that serves the store, if there is one
    addresses: tuple[Address, ...] = ()  # use these daemons and no others

    @classmethod
    def parse(cls, text: str | None) -> DaemonChoice:
        """Parse "auto", "none" (or None), or addresses separated by commas. Raises ConfigError for any other text."""
        if text in (None, NO_DAEMON, AUTO):
            return cls(find=text == AUTO)
        assert text is not None
        names = text.split(",")
        if len(names) > 1 and not all(names):
            raise ConfigError(f"{text!r} has a comma without a daemon.", "Separate the daemons by single commas.")
        addresses = tuple(map(Address.parse, names))
        if len(set(addresses)) != len(addresses):
            raise ConfigError(f"{text!r} names a daemon twice.", "Name each daemon once.")
        return cls(addresses=addresses)


def _size(text: str | int | None) -> Size | None:
    return None if text is None else Size.parse(text)


class SpeculationMode(Enum):
    """Times at which to speculate: while it pays, never, or always."""

    AUTO = "auto"
    OFF = "off"
    ALWAYS = "always"


class RemoteComputeMode(Enum):
    """Whether daemons on other hosts compute experts: while it pays, or never."""

    AUTO = "auto"
    OFF = "off"


MEMORY_GROUP = "memory and device"  # title of a group of options


def _memory_option(help: str, expected: str = "a size, a share or a number of bytes") -> Any:
    """Declare an amount of memory, by default None. ``expected`` says what to give instead of another type."""
    return option(
        None,
        help,
        types=int | str | None,
        expected=expected,
        in_config=True,
        group=MEMORY_GROUP,
        metavar="SIZE",
        parse=_size,
    )


_CPUS = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class HostTierConfig:
    """Options of a host tier: that of this process, or that of the daemon which holds the experts."""

    ram: Size | None = _memory_option(
        'host memory for experts: a size such as "6GiB", or a share such as "50%" of what trunk and context leave '
        f"(default: {DEFAULT_SHARE:.0%}; {GROUP_SHARE:.0%} in a control group with a limit)",
        'a size such as "6GiB", a share: "50%", or a number of bytes',
    )
    policy: str = option(
        DEFAULT_POLICY,
        ". ".join(["which experts are evicted first", *(f"{name}: {POLICIES[name].summary}" for name in POLICIES)]),
        group=MEMORY_GROUP,
        choices=tuple(POLICIES),
    )
    learn: bool = option(
        False,
        "keep a list of the most used experts in $XDG_CACHE_HOME/moetier, and load those of earlier runs at the start",
        group=MEMORY_GROUP,
    )
    loaders: int = option(
        LOADERS,
        "number of experts to read from the disk at the same time",
        group=MEMORY_GROUP,
        metavar="N",
        numbers=Number(int, 1, 64),
    )


@dataclass(frozen=True, slots=True)
class TierConfig(HostTierConfig):
    """Options of the tiers of one process. They are declared here, and in HostTierConfig, only.

    The command line, settings files, ``load``, ``register`` and the ``quantization_config`` of a model directory take
    names, defaults, ranges and help from here. ``of`` makes a checked TierConfig from values as a user writes them.
    """

    device_memory: Size | None = _memory_option("GPU memory for experts, where there is a GPU")
    device: str = option("auto", device_values(), group=MEMORY_GROUP, parse=check_device)
    context: int | None = option(
        None,
        "most tokens of a prompt and its answer together; memory is reserved for their keys and values (default: what "
        "fits into --kv-cache, at most the model's own length)",
        in_config=True,
        group=MEMORY_GROUP,
        metavar="TOKENS",
        numbers=COUNT,
        short="-c",
    )
    kv_cache: Size | None = _memory_option(
        'memory for keys and values, of all sequences and of earlier prompts: a size such as "2GiB", or a share such '
        f'as "50%" of what the trunk leaves (default: {float(KV_SHARE):.0%}, or less if --ram leaves less, but enough '
        "for --context if that is given)",
    )
    kv_bits: int = option(
        16,
        "bits of each number of keys and values: 8 take about half the memory, and change a text a little. Most models "
        "can use them (moetier's own attention is needed)",
        in_config=True,
        group=MEMORY_GROUP,
        choices=(16, 8),
    )
    prefill_chunk: int | None = option(
        None,
        "number of prompt tokens to compute in one forward pass, for which budgets leave room (default: "
        f"{PREFILL_TOKENS}, in at most a fifth of the memory if not all experts fit). Most models compute prompts in "
        "lockstep: there is room for three times as many tokens, of one prompt or of several that wait; "
        "they share each expert that is read",
        group="generation",
        metavar="N",
        numbers=COUNT,
    )
    sequences: int = option(
        1,
        "number of sequences that are computed at a time: by default, kv_cache is no more than their contexts need",
        is_setting=False,
        numbers=COUNT,
    )
    all_logits: bool = option(
        False,
        "leave room for the logits of all tokens that are computed together, not only of the last one",
        is_setting=False,
    )
    threads: int | None = option(
        None,
        "number of threads to compute with (default: OMP_NUM_THREADS, else the number of CPUs that this process may "
        "use by its affinity and its control group's quota)",
        expected=f"a whole number from 1 to {_CPUS}, the CPUs of this machine",
        group=MEMORY_GROUP,
        metavar="N",
        numbers=Number(int, 1, _CPUS, f"Give 1 to {_CPUS}, the CPUs of this machine."),
        short="-t",
    )
    exact: bool = option(
        False,
        'give exactly the results of transformers (experts_implementation="eager"); slower',
        in_config=True,
        group=MEMORY_GROUP,
    )
    same_bits: bool = option(
        False,
        "give a token the same bits in chunks of any size and beside any other sequences, also where prompts and a "
        "16-bit trunk are then slower: on processors with AMX (on others this is always so)",
        group=MEMORY_GROUP,
    )
    daemon: DaemonChoice = option(
        AUTO,
        "where experts come from. auto: a local daemon if one serves this model, else this process's own tier. none: "
        "this process's own tier. NAME, FOLDER or HOST:PORT: that daemon. A,B,C: several daemons, a share from each. "
        "dns:///HOST:PORT: the daemons at all IP addresses of HOST, a share from each",
        types=str | None,
        expected='"auto", None, or addresses separated by commas',
        group="daemon",
        metavar="DAEMON",
        parse=DaemonChoice.parse,
    )
    remote_compute: RemoteComputeMode = option(
        "auto",
        "whether daemons on other hosts may compute experts that are not in memory here, in place of sending them "
        "(auto: where measurements show that this is faster)",
        group="daemon",
        types=str,
        choices=tuple(mode.value for mode in RemoteComputeMode),
        parse=RemoteComputeMode,
    )
    credentials: Credentials = option(
        None,
        "token and certificates for daemons at HOST:PORT",
        types=Credentials | None,
        expected="moetier's Credentials",
        parse=lambda given: given or Credentials(),
        is_setting=False,
    )
    speculate: SpeculationMode = option(
        "auto",
        "load experts early that the routers of the next layers will probably choose (auto: while measurements show "
        "that this is faster)",
        group="speculation",
        types=str,
        choices=tuple(mode.value for mode in SpeculationMode),
        parse=SpeculationMode,
    )
    look_ahead: int = option(  # predictions for later layers fail more often (tests/measurements/speculation.py)
        1,
        "number of layers ahead whose experts are predicted",
        group="speculation",
        metavar="N",
        numbers=Number(int, 1, 8),
    )
    prefetch: int | None = option(
        None,
        "most experts of a block to load on a prediction (default: all that are predicted)",
        group="speculation",
        metavar="N",
        numbers=COUNT,
    )

    @classmethod
    def of(cls, **options: Unpack[LoadOptions]) -> TierConfig:
        """Check and convert options as a user writes them.

        Raises ConfigError for a value that is not allowed, and TypeError for an unknown option.
        """
        config = cls(**read_all(TIER_OPTIONS, options))
        if config.mapped is not None and (asked := config.of_own_tier):
            raise ConfigError(
                f"The daemon {config.mapped} holds the experts in its own memory.",
                f"Give {' and '.join(asked)} to the daemon, not here.",
            )
        if config.credentials != Credentials() and not config.remote:
            raise ConfigError(
                "A token, certificates and `credentials.insecure` are only for a daemon on another host, but `daemon` "
                "names none.",
                "Give `daemon` as HOST:PORT, or leave out the credentials.",
            )
        return config

    @property
    def mapped(self) -> Address | None:
        """Address of the daemon that was named, if it is the only one and on this machine; else None.

        Its memory is mapped, so this process needs no budget for experts.
        """
        addresses = self.daemon.addresses
        return addresses[0] if len(addresses) == 1 and addresses[0].folder else None

    @property
    def of_own_tier(self) -> list[str]:
        """Names of the given options that have an effect only on a host tier of this process."""
        defaults = TierConfig()
        return [f"`{name}`" for name in OF_HOST_TIER if getattr(self, name) != getattr(defaults, name)]

    @property
    def remote(self) -> bool:
        """Whether a daemon is named by HOST:PORT."""
        return any(address.target for address in self.daemon.addresses)


TIER_OPTIONS = options_of(TierConfig)
# options for models in an object store, of ``load`` and of commands
CACHE = named(
    store_cache=Option(
        None,
        "folder in which models at an address are cached (default: $XDG_CACHE_HOME/moetier/objects)",
        types=Path | str | os.PathLike | None,
        metavar="FOLDER",
        parse=lambda folder: None if folder is None else Path(folder),
    ),
    store_cache_size=Option(
        None,
        'most bytes of experts of a model in that cache, such as "50GiB" (default: the size given last, or all)',
        types=str | int | None,
        metavar="SIZE",
    ),
)
OF_HOST_TIER = tuple(options_of(HostTierConfig))


class TierOptions(TypedDict, total=False):
    """The types of the keyword arguments of ``register``, for type checkers, which read no declarations of options.

    A new option is a field of TierConfig and a line here. Its group decides which commands have it: a function of
    ``tools.cli.arguments`` adds each group.

    A test compares names and types with those of TierConfig.
    """

    ram: str | int | None
    device_memory: str | int | None
    daemon: str | None
    remote_compute: str
    credentials: Credentials | None
    policy: str
    speculate: str
    look_ahead: int
    prefetch: int | None
    learn: bool
    loaders: int
    context: int | None
    kv_cache: str | int | None
    kv_bits: int
    sequences: int
    prefill_chunk: int | None
    all_logits: bool
    exact: bool
    same_bits: bool
    threads: int | None


class LoadOptions(TierOptions, total=False):
    """Types of the keyword arguments of ``load``.

    ``register`` lacks ``device``, because ``from_pretrained`` has a device map.
    """

    device: str
