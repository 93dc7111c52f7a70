"""Plan a model on this machine: measure the machine, and estimate for each choice whether it works, and how fast."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import TIER_OPTIONS, Size, TierConfig
from moetier.runtime.libraries.lean import lean_imports
from moetier.runtime.machine.memory import MIN_BYTES, PROCESS_BYTES, Available, shortage
from moetier.runtime.model.names import models_folder
from moetier.tiers.errors import ConfigError, TargetError
from moetier.tiers.layout import BITS, TRUNK_BITS
from moetier.tiers.options import command_words
from moetier.tools.cli.parser import UsageError

if TYPE_CHECKING:
    from .fit import Fit, MachineResources

PLANNED = ("ram", "context", "kv_cache", "kv_bits", "device_memory", "device", "threads", "prefill_chunk")
"""Names of the options of TierConfig that a plan has, too."""
_log = logging.getLogger(__name__)


def plan(
    source: str | Path,
    *,
    bits: list[int] | None = None,
    trunk_bits: list[int] | None = None,
    into: Path | None = None,
    disk: float | None = None,
    memory: str | int | None = None,
    parallel: int = 1,
    cache: Sequence[tuple[str, Any]] = (),
    say: Callable[[str], None] = lambda line: None,
    **resources: Any,
) -> dict[str, Any]:
    """Return the plan as JSON, as ``moetier plan --json`` prints it (docs/plan.md). Raises MoetierError.

    Args:
        source: a checkpoint's folder, a hub id, a GGUF file or a model directory.
        bits: bits per expert weight to choose from; None: all.
        trunk_bits: bits per weight of the trunk to choose from; None: all.
        into: folder whose disk is measured; None: for a hub id the folder of pulled models, else the current folder.
        disk: speed of the disk in GB/s; None: measure it.
        memory: free memory of another machine to plan for, such as "26GiB"; None: what is free here. If it is given,
            free space is only checked in ``into``.
        parallel: number of requests that are computed together, and share the memory for keys and values.
        cache: names and values of the options of an object store's cache, for the recommended command lines.
        say: called with a line of progress before each measurement that takes long.
        resources: PLANNED, as in ``load``.
    """
    _check(bits, trunk_bits, disk, memory)
    parallel = replace(TIER_OPTIONS["sequences"], name="parallel").read(parallel)
    pulls = into is None and not Path(source).exists()
    place = _disk_place(into, pulls=pulls)
    config = TierConfig.of(sequences=parallel, **resources)
    if short := shortage():
        _log.warning("%s", short)
    say(f"reading the configuration of {source}")
    with lean_imports():
        import transformers

        from moetier.runtime.devices.device import chosen_device
        from moetier.runtime.machine.memory import memory_for_model, resident_bytes
        from moetier.runtime.machine.threads import usable_cpus, use_threads

        from .choices import open_choices
        from .cold import cold_start
        from .estimate import choice_entry, estimate
        from .fit import MachineResources, by_preference, fit_of, impossible
        from .speeds import Speeds

    transformers.utils.logging.set_verbosity_error()
    use_threads(config.threads)
    device = chosen_device(config.device)
    if not device.has_memory and config.device_memory is not None:
        raise ConfigError(
            "On a CPU there is no device memory: the CPU computes with the experts in host memory.",
            "Give --ram without --device-memory.",
        )
    kernels = device.kernels()
    machine = MachineResources.measure(device, place, memory_for_model(), resident_bytes())
    if memory is not None:
        machine = _with_memory(machine, memory, into)
    model_choices = open_choices(source)
    chosen = model_choices.chosen(bits, trunk_bits)

    def evaluate(tried: TierConfig) -> list[Fit]:
        return [fit_of(model_choices, choice, tried, machine, kernels) for choice in model_choices.choices]

    fits = [fit for fit in evaluate(config) if fit.choice in chosen]
    if not (working := by_preference(fits)):
        raise impossible(fits, evaluate, config)
    say("measuring this machine for some seconds")
    choices = [fit.choice for fit in working]
    speeds = Speeds.measure(model_choices, choices, machine, disk, config.threads or usable_cpus())
    cold = cold_start(Path(source)) if model_choices.headers is None else None
    forecast = estimate(
        model_choices,
        fits,
        working[0],
        machine,
        speeds,
        options=_words(resources),
        parallel=parallel,
        pulls=pulls,
        named=() if cold is None else (cold["address"], *command_words(cache)),
    )
    if config.ram is not None and not working[0].all_resident:
        free = fit_of(model_choices, working[0].choice, replace(config, ram=None), machine, kernels)
        if free.slot_count > working[0].slot_count:
            forecast["without_ram"] = choice_entry(model_choices, free, machine, speeds)
    return forecast | {"cold_start": cold} | ({} if cold is None else {"source": cold["address"]})


def _disk_place(into: Path | None, *, pulls: bool) -> Path:
    """Return the folder whose disk is measured. Raises TargetError if there is no such folder."""
    from moetier.tools.convert.model_files import nearest_folder  # imports numpy, which starts threads

    place = nearest_folder(models_folder()) if pulls else into or Path()
    if not place.is_dir():
        raise TargetError(f"{place} is not a folder.", "Create it, or name another folder with --into.")
    return place


def _with_memory(machine: MachineResources, memory: str | int, into: Path | None) -> MachineResources:
    """Return ``machine`` with so much free ``memory``, and with its disk's free space only if ``into`` is given."""
    left = Size.parse(memory).of(machine.host.bytes + PROCESS_BYTES) - PROCESS_BYTES
    return replace(
        machine,
        host=Available(max(left, 0), f"--memory {memory}"),
        disk_free=None if into is None else machine.disk_free,
    )


def _check(bits: list[int] | None, trunk_bits: list[int] | None, disk: float | None, memory: str | int | None) -> None:
    """Raise UsageError if a number of bits is not supported, or the speed of the disk is not positive.

    Raises ConfigError if the memory is so small that its unit must be missing.
    """
    for name, given, supported in (("--bits", bits, BITS), ("--trunk-bits", trunk_bits, TRUNK_BITS)):
        if strange := [number for number in given or () if number not in supported]:
            raise UsageError(f"{name} can't be {strange[0]}.", f"Choose from {', '.join(map(str, supported))}.")
    if disk is not None and not 0 < disk < float("inf"):
        raise UsageError(f"--disk can't be {disk}.", "Give a speed in GB/s that is more than 0.")
    if isinstance(memory, str) and memory.isdecimal() and int(memory) < MIN_BYTES:
        raise ConfigError(f"--memory {memory} is {memory} bytes.", f"Did you mean {memory}GiB?")


def _words(resources: dict[str, Any]) -> list[str]:
    """Return those ``resources`` that differ from the defaults, as words of a command line."""
    given = {name: resources[name] for name in TIER_OPTIONS if name in resources}
    return command_words((name, value) for name, value in given.items() if value != TIER_OPTIONS[name].default)
