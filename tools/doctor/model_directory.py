"""Findings about a model directory, its disk, and the memory that it needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.tiers.text import format_bytes

from .machine import Finding, fail, ok, warn

if TYPE_CHECKING:
    from moetier.runtime.machine.memory import Available
    from moetier.tools.plan.fit import Fit

SLOW = 0.3e9  # bytes a second; hard disks and network disks are slower
MIN_MEMORY = 1536 << 20  # bytes that should be left for a model
SAMPLE_BYTES = 128 << 20  # size of the temporary file that is read if there is no store
BLOCK_BYTES = 4 << 20  # size of a read from the temporary file


def memory(directory: Path | None, root: Path = Path("/")) -> Iterator[Finding]:
    """Check how much memory is available, and whether it is enough for the model in ``directory``, or for any model.

    The machine and its control groups limit the memory. ``root`` is the folder that contains /proc and /sys.
    """
    from moetier.runtime.machine.memory import machine_memory, memory_for_model
    from moetier.tiers.errors import MoetierError

    left = memory_for_model(root)
    text = f"of {format_bytes(machine_memory())}, {left.limiter} leaves {format_bytes(left.bytes)} for a model"
    if directory is not None:
        try:
            yield _memory_for(directory, left, text)
            return
        except (MoetierError, OSError):  # the check of the store reports it
            pass
    if left.bytes >= MIN_MEMORY:
        yield ok("memory", text)
    else:
        yield warn("memory", text, "Free some memory, or raise the control group's limit.")


def _fit(directory: Path, left: Available) -> tuple[Fit, int]:
    """Return the fit that ``moetier plan`` would find for the memory that is left, and its context in tokens.

    Raises MoetierError.
    """
    from moetier.runtime.libraries.lean import lean_imports

    with lean_imports():
        from moetier.runtime.config import TierConfig
        from moetier.runtime.devices.device import chosen_device
        from moetier.tools.plan.choices import open_choices
        from moetier.tools.plan.fit import MachineResources, fit_of

        device = chosen_device("auto")
        model_choices = open_choices(directory)
    choice = next((candidate for candidate in model_choices.choices if candidate.as_it_is), model_choices.choices[0])
    resources = MachineResources.measure(device, directory, left, 0)
    fit = fit_of(model_choices, choice, TierConfig.of(), resources, device.kernels())
    return fit, fit.needs.kv.context


def _all_fit(directory: Path, root: Path) -> bool:
    """Return whether all experts fit into memory by default."""
    from moetier.runtime.machine.memory import memory_for_model
    from moetier.tiers.errors import MoetierError

    try:
        return _fit(directory, memory_for_model(root))[0].all_resident
    except (MoetierError, OSError):  # the check of the store reports it
        return False


def _memory_for(directory: Path, left: Available, text: str) -> Finding:
    """Compare the memory that is left with what the model needs. Raises MoetierError."""
    from moetier.tiers.cache.budget import smallest_budget

    fit, context = _fit(directory, left)
    choice = fit.choice
    if fit.problem is not None:
        return fail("memory", f"{text}. {fit.problem.cause}", f"{fit.problem.fix} Or convert the model to fewer bits.")
    smallest, largest = map(format_bytes, (smallest_budget(choice.manifest), choice.manifest.stored_bytes))
    text = (
        f"{text}; the trunk takes {format_bytes(choice.trunk_bytes)}, a context of {context} tokens and "
        f"computing {format_bytes(fit.needs.reserve)}, experts {smallest} to {largest}: by default "
        f"{format_bytes(fit.arena_bytes)}, {fit.slot_count} of {choice.manifest.record_count}"
    )
    if fit.streams:
        return warn(
            "memory", f"{text}: fewer than one token uses", "Free some memory, or convert the model to fewer bits."
        )
    return ok("memory", text)


def health(directory: Path, *, checksums: bool) -> Iterator[Finding]:
    """Check manifest, sizes and indexes and, if ``checksums``, all bytes. Raises StoreError if there is no store."""
    from moetier.runtime.model.names import listed_name
    from moetier.runtime.model.same_bits import bits_of
    from moetier.runtime.stores.registry import open_store
    from moetier.tiers.objects.cache_folder import cache_of
    from moetier.tiers.store.folder import CACHE, command
    from moetier.tiers.store.scrub import scrub

    from .survey import survey

    with open_store(directory, damaged=True) as store:
        result = survey(store)
        yield from (fail("store", fault, store.fix) for fault in result["faults"])
        if result["faults"]:
            return
        what = (
            f"{listed_name(directory) or result['model']}: {result['records']:,} experts in "
            f"{len(result['blocks'])} blocks, "
            f"{format_bytes(result['expert_bytes'])}, trunk {format_bytes(result['trunk_bytes'])}; "
            f"{bits_of(result['varying_part'])}"
        )
        if result["linked"] is False:
            yield warn("store", f"{what}; without checksums", f"Make them: {command('link', directory)}")
            return
        if not checksums:
            # a cache of an object store is verified by its address
            verify = command("verify", cache_of(directory)[0] if (directory / CACHE).exists() else directory)
            yield ok("store", f"{what}; opened without a fault; the bytes were not read ({verify} reads them)")
            return
        scrubbed = chain(scrub(store), store.scrub_other_files())
        bad = [problem for problem in scrubbed if not isinstance(problem, int)]
        yield from (fail("store", problem.cause, store.fix) for problem in bad)
        if not bad:
            yield ok("store", f"{what}; every byte is as it was written")


def disk(directory: Path | None, seconds: float, root: Path = Path("/")) -> Iterator[Finding]:
    """Check whether files can be read past the page cache, and measure random reads for ``seconds``.

    The reads are from the records of ``directory`` or, if it is None, from a temporary file in the current folder.
    ``root`` is as in ``memory``. Raises StoreError if there are no records, and OSError if a file can't be read or
    written.
    """
    from moetier.tiers.errors import TargetError
    from moetier.tiers.source import LOADERS
    from moetier.tools.rates.hardware import disk_of
    from moetier.tools.rates.reads import RandomReads

    place = directory if directory is not None else Path.cwd()
    other = "Name a model directory (moetier doctor DIR), or run the command in another folder."
    if directory is None and (free := shutil.disk_usage(place).free) < 4 * SAMPLE_BYTES:
        yield warn("disk", f"The disk of {place} has only {format_bytes(free)} free: it was not measured.", other)
        return
    try:
        sample = RandomReads.of_new_file(place, SAMPLE_BYTES, BLOCK_BYTES)
        with sample if directory is None else nullcontext(RandomReads.of_records(directory)) as reads:
            rate = reads.rate(LOADERS, seconds)
    except TargetError as error:
        yield warn("disk", f"{error.cause} The speed of the disk was not measured.", other)
        return
    name = disk_of(place)
    if reads.is_direct:
        yield ok("O_DIRECT", f"{name}: files can be read past the page cache")
    else:
        advice = "Put model directories on ext4, xfs or btrfs."
        yield warn("O_DIRECT", f"{name}: files can only be read through the page cache, which they fill", advice)
    size = format_bytes(reads.block_bytes)
    text = f"{rate / 1e9:.2f} GB/s, random reads of {size}, {LOADERS} at a time, by {reads.by}"
    if rate < SLOW:
        more = "" if directory is not None and _all_fit(directory, root) else ", or give experts more memory: --ram"
        yield warn("disk", text, f"Put model directories on an SSD{more}.")
    else:
        yield ok("disk", text)
