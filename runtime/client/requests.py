"""What a daemon of this host is asked for, and what comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from moetier.proto import expert_store_pb2 as wire
from moetier.tiers.errors import MoetierError

Place = TypeVar("Place")  # what a connection leads to: the mapped arena


@dataclass(frozen=True, slots=True)
class Granted(Generic[Place]):
    """The daemon holds a record in a slot of ``place``."""

    request: Request
    expert: int
    slot: int
    generation: int
    place: Place


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over."""

    request: Request
    error: MoetierError


@dataclass(frozen=True, slots=True)
class Changed:
    """The daemon is away, or back; or the link was closed."""


Event = Granted[Place] | Failed | Changed


@dataclass(eq=False, slots=True)
class Request:
    """Experts of one block that the daemon is asked for. ``deliver`` gets what comes of it; it must not wait."""

    block: int
    awaited: dict[int, None]  # the experts that it was not granted yet; the link's to change
    deliver: Callable[[Any], None]
    is_over: bool = False  # the daemon knows that it is
    number: int = field(default_factory=itertools.count(1).__next__)

    def message(self) -> wire.ClientMessage:
        acquire = wire.Acquire(request=self.number, block=self.block, experts=list(self.awaited))
        return wire.ClientMessage(acquire=acquire)
