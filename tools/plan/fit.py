"""Fit of a choice on this machine: whether it works, and its slots and bytes in each tier.

They are computed as when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetier.runtime.config import TierConfig
from moetier.runtime.devices.device import ComputeDevice, MemoryDevice
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import MARGIN_BYTES, MARGIN_SHARE, Available
from moetier.runtime.model.budgets import ModelMemory, Needs
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.errors import BudgetError, DiskSpaceError, MoetierError
from moetier.tiers.text import format_bytes
from moetier.tools.convert.model_files import free_bytes
from moetier.tools.convert.target import SLACK_BYTES

from .choices import Choice, ModelChoices

# Bits of experts and of the trunk, the recommended ones first. If all experts fit in memory at 8 bits,
# ``by_preference`` puts 8 bits first. A trunk of 8 bits has no measurable loss of quality; a trunk of 4 bits has
# (docs/quality.md).
BITS_ORDER, TRUNK_ORDER = (4, 3, 2, 8, 16), (8, 4, 16)
MIN_CONTEXT = 256  # shortest context, in tokens, that is tried if a longer one does not fit


@dataclass(frozen=True)
class MachineResources:
    """Free memory and disk of this machine, for a process that has already imported what a model needs."""

    host: Available
    device: ComputeDevice
    on_device: Available | None  # None if it has no memory
    disk_free: int | None  # bytes, on the disk of ``into``; None: the disk is that of another machine
    idle_bytes: int  # memory that such a process takes
    into: Path  # folder in which the model directory will be

    @classmethod
    def measure(cls, device: ComputeDevice, into: Path, host: Available, idle_bytes: int) -> MachineResources:
        """Measure the free memory of ``device``, if it has any, and the free disk space of ``into``.

        ``host``: free memory of the host; ``idle_bytes``: memory of a process that has imported what a model needs.
        """
        on_device = device.free_memory() if isinstance(device, MemoryDevice) else None
        return cls(host, device, on_device, free_bytes(into), idle_bytes, into)


@dataclass(frozen=True)
class Fit:
    """The slots and the memory that a choice would have on this machine.

    If disk or memory is too small for it, ``problem`` is the error, ``slots`` is empty and ``device_slots`` is None.
    """

    choice: Choice
    needs: Needs
    slots: Mapping[str, int]  # of the host tier, by zarr array of the store
    device_slots: Mapping[str, int] | None  # the same of the device tier; None on a CPU
    arena_bytes: int
    problem: MoetierError | None

    @property
    def works(self) -> bool:
        """Whether the choice works on this machine."""
        return self.problem is None

    @property
    def slot_count(self) -> int:
        """Number of slots of the host tier, summed over the store's zarr arrays (one for each record layout)."""
        return sum(self.slots.values())

    @property
    def all_resident(self) -> bool:
        """Whether the host tier has a slot for every expert."""
        return self.works and self.slot_count == self.choice.manifest.record_count

    @property
    def streams(self) -> bool:
        """Whether the experts of one token, over all blocks, do not fit into the slots."""
        return self.works and self.slot_count < sum(block.top_k for block in self.choice.manifest.blocks)


def fit_of(
    model_choices: ModelChoices, choice: Choice, config: TierConfig, resources: MachineResources, kernels: Kernels
) -> Fit:
    """Compute the slots and memory of a choice, with the budgets that loading it would use.

    ``config``: the options that were given; ``kernels``: the kernels of ``resources.device``. If disk or memory is too
    small, no error is raised: the error is the ``problem`` of the result.
    """
    manifest, model = choice.manifest, model_choices.model
    trunk = 0 if resources.device.has_memory else choice.trunk_bytes
    free = resources.host if resources.on_device is None else _without(resources.on_device, choice.trunk_bytes)
    needs = Needs.of(model, manifest, config, kernels, available=free, trunk=trunk, matrices=choice.matrices)
    memory = ModelMemory(manifest, config, resources.device, needs)
    slots: Mapping[str, int] = {}
    device_slots, arena, problem, limited = None, 0, _disk_problem(model_choices, choice, resources), resources.host
    try:
        slots = memory.host_slots(resources.host)
        if resources.on_device is not None:
            limited = resources.on_device
            device_slots = memory.device_slots(free)
        arena = ArenaLayout.of(manifest, slots).nbytes
    except BudgetError as error:
        problem, slots = problem or _memory_problem(error, choice, memory.needs, config, limited, resources), {}
    if problem:
        slots, device_slots = {}, None
    return Fit(choice, memory.needs, slots, device_slots, arena, problem)


def _without(available: Available, nbytes: int) -> Available:
    return replace(available, bytes=max(available.bytes - nbytes, 0))


def _disk_problem(model_choices: ModelChoices, choice: Choice, resources: MachineResources) -> MoetierError | None:
    if (headers := model_choices.headers) is None or choice.as_it_is:
        return None
    needed, what = choice.disk_bytes + SLACK_BYTES, f"A model directory with {choice.options} takes"
    if headers.on_hub:
        needed += model_choices.passing_bytes
        what = f"A model directory with {choice.options}, and files of the checkpoint during the conversion, take"
    if resources.disk_free is None or needed <= resources.disk_free:
        return None
    return DiskSpaceError(
        f"{what} {format_bytes(needed)} in {resources.into.resolve()}; {format_bytes(resources.disk_free)} are free.",
        "Free some space, or name another disk with --into.",
    )


def _memory_problem(
    error: BudgetError,
    choice: Choice,
    needs: Needs,
    config: TierConfig,
    limited: Available,
    resources: MachineResources,
) -> BudgetError:
    """Return a BudgetError that counts all memory that is needed; ``error`` does not count the trunk.

    ``limited`` is the memory that is too small, the host's or the GPU's. If there is a GPU, its memory holds trunk and
    context, and the host's memory holds only experts. If ``error`` is about a given budget, return it unchanged.
    """
    if (config.ram or config.device_memory) and "Give `" in error.fix:
        return error
    least = smallest_budget(choice.manifest)
    experts = f"the experts that a token uses in a block ({format_bytes(least)})"
    if resources.on_device is not None and limited is resources.host:
        needed = needed_bytes(least)
        what = f"{experts} need {format_bytes(needed)} of the host's memory"
    else:
        needed = needed_bytes(needs.reserve + least) + choice.trunk_bytes
        what = (
            f"the trunk ({format_bytes(choice.trunk_bytes)}), a context of {needs.kv.context} tokens "
            f"({format_bytes(needs.reserve)}) and {experts} need {format_bytes(needed)}"
        )
    on_gpu = limited is resources.on_device
    return BudgetError(
        f"With {choice.options}, {what}; {limited.limiter} leaves {format_bytes(limited.bytes)}.",
        "Free some memory of the GPU, or give --device cpu." if on_gpu else "Free some memory, or raise the limit.",
    )


def needed_bytes(used: int) -> int:
    """Return how many bytes must be free so that ``used`` bytes can be used beside the margin of ``machine.memory``."""
    return int((used + MARGIN_BYTES) / (1 - MARGIN_SHARE))


def by_preference(fits: Iterable[Fit]) -> list[Fit]:
    """Return the fits that work, the recommended one first."""

    def rank(fit: Fit) -> tuple[int, bool, bool, int]:
        choice = fit.choice
        if choice.native and choice.bits == 4:
            bits = -2  # its weights were trained in 4 bits, or quantised with data that moetier does not have
        else:
            bits = -1 if choice.bits == 8 and fit.all_resident else BITS_ORDER.index(choice.bits)
        return bits, not choice.native, not choice.as_it_is, TRUNK_ORDER.index(choice.trunk_bits)

    return sorted((fit for fit in fits if fit.works), key=rank)


def impossible(asked: Sequence[Fit], evaluate: Callable[[TierConfig], list[Fit]], config: TierConfig) -> MoetierError:
    """Return an error that says why none of the fits ``asked`` works, and which other bits or context would work.

    ``evaluate`` returns the fits of all choices with a given config.
    """
    problem = min(asked, key=lambda fit: fit.choice.disk_bytes).problem
    assert problem is not None
    if "Give `" in problem.fix:  # a budget is out of bounds, and the error names the bounds
        return problem
    tried = config
    while True:
        if fits := by_preference(evaluate(tried)):
            nearest = max(fits, key=lambda fit: (fit.choice.bits, fit.choice.trunk_bits))
            context = f" --context {tried.context}" if tried.context != config.context else ""
            return type(problem)(problem.cause, f"{nearest.choice.options}{context} works. {problem.fix}")
        tokens = tried.context or max(fit.needs.kv.context for fit in asked)
        if tokens <= MIN_CONTEXT:
            return type(problem)(problem.cause, f"Other bits or a shorter context would not help. {problem.fix}")
        tried = replace(tried, context=max(tokens // 2, MIN_CONTEXT))


def memory_of(fit: Fit, resources: MachineResources) -> dict[str, Any]:
    """Return the memory of a process that runs ``fit``, in bytes by part, once its context and its slots are full."""
    on_host = not resources.device.has_memory
    parts = {
        "idle_bytes": resources.idle_bytes,
        "trunk_bytes": fit.choice.trunk_bytes,
        "kv_cache_bytes": fit.needs.kv.nbytes,
        "computing_bytes": fit.needs.reserve - fit.needs.kv.nbytes,
        "experts_bytes": fit.arena_bytes,
    }
    beside = () if on_host else ("trunk_bytes", "kv_cache_bytes", "computing_bytes")  # these are on the device
    return parts | {"process_bytes": sum(size for name, size in parts.items() if name not in beside)}
