"""``moetier.plan``: a plan for programs, as a frozen report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers  # all of it: what ``forecast`` imports is without the parts that commands never use

from moetier.runtime.config import TIER_OPTIONS
from moetier.runtime.model.names import checkpoint_or_model, directory_at, is_address
from moetier.tiers.options import declare_keywords, read_all

from . import forecast

OPTIONS = {name: TIER_OPTIONS[name] for name in forecast.PLANNED}
# of a plan, in their order; one of an earlier version has "generate" in place of the last two
COMMANDS = ("pull", "convert", "generate", "chat", "serve")


@dataclass(frozen=True)
class PlannedChoice:
    """One way to store the model, and what it costs on this machine. Rates are None where they can't be estimated."""

    bits: int  # per expert weight
    trunk_bits: int
    native: bool  # experts stay quantised as the checkpoint has them
    as_it_is: bool  # nothing is converted
    works: bool
    problem: str | None  # why it does not work
    disk_bytes: int
    convert_seconds: float | None
    process_bytes: int | None  # memory of a process, when all slots are full
    slots: int | None  # experts that have room in memory
    hit_ratio: float | None  # estimated
    tokens_per_s: float | None  # of decoding
    limited_by: str | None  # "disk", "memory" or "compute"
    prompt_tokens_per_s: float | None

    @classmethod
    def of(cls, choice: dict[str, Any]) -> PlannedChoice:
        """Make a choice from its JSON."""
        memory, decode, prefill = (choice.get(name) or {} for name in ("memory", "decode", "prefill"))
        kept = ("bits", "trunk_bits", "native", "as_it_is", "works", "problem", "disk_bytes")
        return cls(
            **{name: choice[name] for name in kept},
            convert_seconds=choice["convert_s"],
            process_bytes=memory.get("process_bytes"),
            slots=choice.get("slots"),
            hit_ratio=choice.get("hit_ratio"),
            tokens_per_s=decode.get("tokens_per_s"),
            limited_by=decode.get("by"),
            prompt_tokens_per_s=prefill.get("tokens_per_s"),
        )


@dataclass(frozen=True)
class Plan:
    """A plan: the ways to store a model, and which of them is recommended."""

    model: str
    records: int  # experts of all blocks
    context: int  # tokens
    choices: tuple[PlannedChoice, ...]
    recommended: PlannedChoice
    commands: tuple[str, ...]  # command lines that make and run the recommended choice
    text: str = field(repr=False)  # the whole plan, as JSON

    @classmethod
    def of(cls, plan: dict[str, Any]) -> Plan:
        """Make a report from the JSON of a plan."""
        best = plan["recommended"]
        choices = tuple(map(PlannedChoice.of, plan["choices"]))
        keys = ("bits", "trunk_bits", "native")
        return cls(
            model=plan["model"],
            records=plan["records"],
            context=plan["context"],
            choices=choices,
            recommended=next(one for one in choices if all(getattr(one, key) == best[key] for key in keys)),
            commands=tuple(command for name in COMMANDS if (command := best.get(name))),
            text=json.dumps(plan),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the whole plan, as ``moetier plan --json`` prints it."""
        document: dict[str, Any] = json.loads(self.text)
        return document


def plan(
    source: str | os.PathLike[str],
    *,
    bits: Sequence[int] | None = None,
    trunk_bits: Sequence[int] | None = None,
    into: str | os.PathLike[str] | None = None,
    disk: float | None = None,
    memory: str | int | None = None,
    parallel: int = 1,
    **options: Any,
) -> Plan:
    """Estimate whether a model runs on this machine, and how fast, before its weights are downloaded.

    Measures this machine for some seconds.

    Args:
        source: an id on the Hugging Face hub, a checkpoint's folder, a GGUF file, a model directory, a name that
            `moetier list` shows, or an address in an object store.
        bits: bits per expert weight to choose from; None: all.
        trunk_bits: bits per weight of everything else to choose from; None: all.
        into: folder whose disk is measured; None: the current folder, or for an id on the hub that of pulled models.
        disk: speed of the disk in GB/s; None: measure it.
        memory: free memory of another machine to plan for, such as "26GiB"; None: what is free here. If it is given,
            free space is only checked in ``into``.
        parallel: number of requests that `moetier serve` computes together, and that share keys and values.
        options: those of ``load`` in PLANNED.

    Raises:
        MoetierError: an option or the source can't be used, or no choice works here.
        TypeError: there is no such option.
    """
    read_all(OPTIONS, options)  # before anything is read or downloaded
    name = os.fspath(source)
    place = str(directory_at(name, outline=True)) if is_address(name) else checkpoint_or_model(name)
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    try:
        document = forecast.plan(
            place,
            bits=None if bits is None else list(bits),
            trunk_bits=None if trunk_bits is None else list(trunk_bits),
            into=None if into is None else Path(into),
            disk=disk,
            memory=memory,
            parallel=parallel,
            **options,
        )
    finally:
        log.set_verbosity(verbosity)
    return Plan.of(document)


declare_keywords(plan, OPTIONS)
