"""Replay a trace: simulate tiers of several sizes and policies on it, and estimate their speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.trace.recall import compare
from moetier.runtime.trace.trace import Trace
from moetier.tiers.errors import ConfigError

from .simulation import SIMULATED, Outcome, simulate


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a token, without overlap of reading and computing."""

    record: int | None = None  # bytes of an expert
    disk: float | None = None  # speed at which misses are read, in GB/s
    link: float | None = None  # speed at which misses of the device tier are copied, in GB/s
    compute: float = 0.0  # milliseconds, if all experts are in memory

    def of(self, loads: float, copies: float) -> dict[str, float]:
        """Return what ``loads`` and ``copies`` of experts for a token cost, as JSON. Unknown costs are left out."""
        if self.record is None:
            return {}
        seconds = self.compute / 1e3
        seconds += loads * self.record / (self.disk * 1e9) if self.disk else 0.0
        seconds += copies * self.record / (self.link * 1e9) if self.link else 0.0
        speed = {"tokens_per_s": 1 / seconds} if seconds and (self.disk or self.link) else {}
        return {"bytes_per_token": loads * self.record, **speed}


def replay(
    path: Path, slots: Sequence[int] | None, policies: Sequence[str] | None, device_slots: int, costs: Costs
) -> dict[str, Any]:
    """Return the results of simulated tiers on a trace, and the recall of its predictions, as JSON.

    Args:
        path: file of the trace.
        slots: numbers of experts of each block to cache, ascending; None: all numbers up to 8, or eighths of a block.
        policies: keys of SIMULATED; None: all.
        device_slots: number of experts of each block in a device tier; 0: no device tier.

    Raises ConfigError if the file is not a trace, or a block has fewer experts than ``slots``.
    """
    trace = Trace.load(path)
    most = max(trace.num_experts)
    if slots and slots[-1] > most:
        raise ConfigError(f"--slots {slots[-1]}: the blocks of {path} have {most} experts.", f"Give at most {most}.")
    return {
        "trace": str(path),
        "model": trace.model,
        "tokens": trace.tokens,
        "sequences": len(trace.sequences),
        "prompt_tokens": sum(trace.n_prefill),
        "blocks": trace.block_count,
        "experts": most,
        "top_k": trace.top_k,
        "results": [
            _result(simulate(trace, policy, number, device_slots=device_slots), device_slots, costs)
            for number in slots or (range(1, most + 1) if most <= 8 else range(most // 8, most + 1, most // 8))
            for policy in policies or SIMULATED
        ],
        "recall": [asdict(compared) for compared in compare(trace)],
    }


def _result(outcome: Outcome, device_slots: int, costs: Costs) -> dict[str, Any]:
    tokens = outcome.tokens or 1  # without tokens nothing was decoded, and there are no misses
    loads = outcome.decoding.misses / tokens
    copies = outcome.device.misses / tokens if device_slots else 0.0
    device = {"device_hit_ratio": outcome.device.hit_ratio, "copies_per_token": copies} if device_slots else {}
    return {
        "policy": outcome.policy,
        "slots": outcome.slots,
        "hit_ratio": outcome.decoding.hit_ratio,
        "loads_per_token": loads,
        "prompt_loads": outcome.prompts.misses,
        "preloads": outcome.preloads,
        **device,
        **costs.of(loads, copies),
    }
