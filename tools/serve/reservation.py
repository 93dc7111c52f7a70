"""Host memory that models reserve: that of a loaded model, and that of one which is to be loaded beside others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.config import TierConfig
from moetier.runtime.devices.device import chosen_device, device_class
from moetier.runtime.machine.memory import Available
from moetier.runtime.model.budgets import scratch_elements
from moetier.runtime.moe.linear import quantized_linears
from moetier.runtime.stores.registry import read_manifest
from moetier.runtime.wire.address import daemons_serving
from moetier.tools.plan.choices import open_choices
from moetier.tools.plan.fit import MachineResources, fit_of, needed_bytes


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a model takes of the memory that there is for models.

    Attributes:
        nbytes: bytes, with the margin that is left to the kernel.
        options: keyword arguments of ``load`` with which it takes no more, even if more is free.
    """

    nbytes: int
    options: Mapping[str, Any]


def reservation_of(location: Path, resources: Mapping[str, Any], available: Available) -> Reservation | None:
    """Return what a model would take if it were the only one, by the same calculation as in loading it.

    Args:
        location: its model directory, checkpoint folder or GGUF file.
        resources: keyword arguments of ``load``.
        available: the memory that is free if no model is loaded.

    Returns:
        What it would take; None if it is computed on a device with memory of its own: it then has to be alone.

    Raises BudgetError if it does not fit, and what ``open_choices`` raises if there is no model.
    """
    config = TierConfig.of(**resources)
    if (device := chosen_device(config.device)).has_memory:
        return None
    choices = open_choices(location)
    choice = next(each for each in choices.choices if each.as_it_is or choices.headers is None)
    machine = MachineResources(available, device, None, 0, 0, location)
    fit = fit_of(choices, choice, config, machine, device.kernels(exact=config.exact))
    if fit.problem is not None:
        raise fit.problem
    beside = choice.trunk_bytes + fit.needs.reserve
    if config.mapped is not None or (config.daemon.find and daemons_serving(read_manifest(location).digest)):
        return Reservation(needed_bytes(beside), {})
    options = {"ram": fit.arena_bytes, "prefill_chunk": fit.needs.prefill.tokens}
    if fit.needs.kv.nbytes:
        options["kv_cache"] = fit.needs.kv.nbytes
    return Reservation(needed_bytes(beside + fit.arena_bytes), options)


def reserved_bytes(model: Any) -> int:
    """Return how many bytes of host memory a loaded model takes, as ``Reservation`` counts them."""
    tiers = model.tiers
    arena = 0 if tiers.origin.daemon is not None else tiers.host.stats().memory_bytes
    if device_class(model.device.type).has_memory:
        return needed_bytes(arena)
    tensors = {
        tensor.data_ptr(): tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers())
    }  # the head may be the embedding
    matrices = [linear.layout for linear in quantized_linears(model)]
    scratch = scratch_elements(tiers.manifest, matrices, tiers.kernels) * model.dtype.itemsize
    return needed_bytes(sum(tensors.values()) + tiers.kv.nbytes + scratch + tiers.prefill.nbytes + arena)
