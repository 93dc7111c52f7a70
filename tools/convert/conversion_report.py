"""Report of a conversion: its result and cost, as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moetier.runtime.config import format_bytes
from moetier.tools.cli.report import table


@dataclass(frozen=True)
class BlockReport:
    """Result for one block.

    ``error`` is the relative error of its stored weights. It is None if an earlier run made the block and its error was
    not kept.
    """

    path: str
    experts: int
    stored_bytes: int
    error: float | None


@dataclass(frozen=True)
class ConversionReport:
    """Result and cost of a conversion."""

    model: str
    target: str
    bits: int
    trunk_bits: int
    source_bytes: int
    trunk_bytes: int
    trunk_matrices: int  # number of quantised matrices
    trunk_error: float | None  # relative error of their weights; None if this run quantised none
    blocks: tuple[BlockReport, ...]
    weights: int  # number of weights of all experts
    seconds: float
    peak_bytes: int  # peak memory of this process since its start
    resumed_blocks: int  # number of blocks that an earlier run finished
    was_complete: bool  # whether the model directory was complete, so that nothing was written

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of all experts."""
        return sum(block.stored_bytes for block in self.blocks)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per expert weight, including scales, padding and checksums."""
        return self.expert_bytes * 8 / self.weights

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the properties as JSON."""
        return asdict(self) | {"expert_bytes": self.expert_bytes, "bits_per_weight": self.bits_per_weight}

    def table(self) -> str:
        """Return the report as text."""
        if self.was_complete:
            trunk = f" and a trunk of {self.trunk_bits}" if self.trunk_bits != 16 else ""
            return f"{self.target} is complete: it holds {self.model} with experts of {self.bits} bits{trunk} already."
        rows = [["block", "experts", "size", "mean relative error"]]
        for block in self.blocks:
            error = "-" if block.error is None else f"{block.error:.4f}"
            rows.append([block.path, str(block.experts), format_bytes(block.stored_bytes), error])
        error = "" if self.trunk_error is None else f"{self.trunk_error:.4f}"
        totals = [
            ["source", format_bytes(self.source_bytes)],
            ["trunk", format_bytes(self.trunk_bytes)],
            *([[f"its {self.trunk_matrices} matrices of {self.trunk_bits} bits", "error " + error]] if error else []),
            ["experts", format_bytes(self.expert_bytes)],
            ["bits per expert weight", f"{self.bits_per_weight:.3f}"],
            ["time", f"{self.seconds:.1f} s"],
            ["peak memory", format_bytes(self.peak_bytes)],
        ]
        return f"{table(rows)}\n\n{table(totals)}"
