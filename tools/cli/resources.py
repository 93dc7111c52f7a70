"""What every command that runs a model is told: memory it may take, where it computes, whose experts it uses."""

from __future__ import annotations

import argparse
from typing import Any

from moetier.runtime.config import AUTO, DEFAULT_CONTEXT, LOOK_AHEAD, SPECULATE, Size, TierConfig
from moetier.runtime.number import COUNT, Number
from moetier.runtime.threads import machine_cpus
from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS

from .access import add_credentials, credentials
from .options import group_of
from .parser import checked

LAYERS = Number(int, 1, 8, "Give 1 to 8.")
THREADS = Number(int, 1, machine_cpus(), f"Give 1 to {machine_cpus()}, the CPUs of this machine.")
LEAVES_ROOM = (
    "budgets leave room for so long a context; a longer one takes more. Of no effect with a daemon of this machine "
    "on a CPU"
)


def size(text: str) -> str:
    """An amount of memory as it is written, checked when it is read, beforehand too. Raises ConfigError."""
    Size.parse(text)
    return text


def device(text: str) -> str:
    """Likewise, the name of a device."""
    TierConfig.of(device=text)
    return text


def daemons(text: str) -> str:
    """Likewise, whose experts."""
    TierConfig.of(daemon=text)
    return text


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    """A parser's, or a group's."""
    parser.add_argument(
        "--device-memory", type=size, metavar="SIZE", help="device budget for experts, where there is a GPU"
    )
    parser.add_argument(
        "--device", type=device, default="auto", help='"auto", "cpu", "cuda" or "cuda:N" (default: %(default)s)'
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    """Of every command that computes. A parser's, or a group's."""
    parser.add_argument(
        "--threads",
        type=THREADS,
        metavar="N",
        help="threads to compute with (default: OMP_NUM_THREADS; else as many as there are CPUs for this process, a "
        "control group's quota counted)",
    )


def add_resource_arguments(parser: argparse.ArgumentParser, context: str = LEAVES_ROOM) -> None:
    """``context`` says what --context does."""
    memory, daemon = group_of(parser, "memory and device"), group_of(parser, "daemon")
    memory.add_argument(
        "--ram",
        type=size,
        metavar="SIZE",
        help='host budget for experts: "6GiB", or "50%%" of what the rest leaves; default: 80%%. With a daemon of '
        "this machine it has no effect, nor have --policy and --learn: they are the daemon's to be given",
    )
    add_device_arguments(memory)
    daemon.add_argument(
        "--daemon",
        type=daemons,
        default=AUTO,
        metavar="WHOSE",
        help="whose experts: auto, a running daemon's that serves this very store, else this process's own; none, its "
        "own; NAME, FOLDER or HOST:PORT, that daemon's; A,B,C, each has a share (default: %(default)s)",
    )
    memory.add_argument(
        "--policy",
        default=DEFAULT_ORDER,
        choices=list(ORDERS),
        help="who is evicted from the host tier: lru, least recently used; scan, the same, but a long prompt leaves "
        "what is cached in place; lrfu, as scan, but least often used of late (default: %(default)s)",
    )
    memory.add_argument(
        "--learn",
        action=argparse.BooleanOptionalAction,
        help="keep which experts are used most ($XDG_CACHE_HOME/moetier), and begin with those of earlier runs",
    )
    memory.add_argument(
        "--context",
        type=COUNT,
        default=DEFAULT_CONTEXT,
        metavar="TOKENS",
        help=f"{context} (default: %(default)s)",
    )
    add_threads(memory)
    memory.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        help="compute bit for bit as transformers does with eager experts and the same decoded weights, slower",
    )
    parser.set_defaults(learn=False, exact=False)
    add_credentials(parser)


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Of commands that decode and do nothing else."""
    group = group_of(parser, "speculation")
    group.add_argument(
        "--speculate",
        choices=SPECULATE,
        default="auto",
        help="promote experts beforehand that the next layers' gates predict: auto, while it is measured to pay "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--look-ahead", type=LAYERS, default=LOOK_AHEAD, metavar="N", help="layers to predict (default: %(default)s)"
    )
    group.add_argument(
        "--prefetch",
        type=COUNT,
        metavar="N",
        help="experts of a block to promote on a prediction, at most (default: as many as are worth it)",
    )


def speculation_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """For ``resources_of``, which checks it."""
    return {name: getattr(arguments, name) for name in ("speculate", "look_ahead", "prefetch")}


def resources_of(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The keyword arguments of ``load``, ``more`` among them, checked. Raises UsageError.

    What is said on the command line and can't be had is an error; what is set beforehand gives way (``settings.py``).
    """
    _give_way(arguments)
    found = {
        "ram": arguments.ram,
        "device_memory": arguments.device_memory,
        "device": arguments.device,
        "daemon": arguments.daemon,
        "credentials": credentials(arguments),
        "policy": arguments.policy,
        "learn": arguments.learn,
        "context": arguments.context,
        "exact": arguments.exact,
        "threads": arguments.threads,
    }
    found |= more
    with checked():
        TierConfig.of(**found)
    return found


def asked(arguments: argparse.Namespace, name: str) -> bool:
    """Whether a command line says so, and not only what is set beforehand."""
    value, configured = getattr(arguments, name), getattr(arguments, "configured", {})
    said = value is not None and value is not False
    return said and (name not in configured or configured[name] != value)


def _give_way(arguments: argparse.Namespace) -> None:
    """What is set beforehand for an own host tier is not asked of a daemon's, nor what a daemon of another host is
    shown of one that is none."""
    where = TierConfig.of(daemon=arguments.daemon)
    unused = {"ram": None, "policy": DEFAULT_ORDER, "learn": False} if where.mapped is not None else {}
    if not any(address.target for address in where.daemons):
        unused |= dict.fromkeys(("token_file", "tls_ca", "tls_cert", "tls_key"))
    for name, default in unused.items():
        if not asked(arguments, name):
            setattr(arguments, name, default)
