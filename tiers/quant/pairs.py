"""The pairs (s, b) of the groups, as a record stores them: in bf16, or in 8 bits of runs of groups.

8-bit pairs: the groups in [group, row] order are cut into runs of PAIR_BLOCK; s and b of a run are each stored as
code * scale + minimum, with scale and minimum in bf16, and that value is rounded to bf16. So a kernel sees bf16 pairs
in either case.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.tiers.layout import PAIR_BLOCK, Projection


def store_pairs(
    values: Tensor, which: int, projection: Projection, sections: Mapping[str, Tensor], start: int
) -> Tensor:
    """Writes s (``which`` 0) or b (1) of the rows from ``start`` on, fp32 [K / g, rows], into the pair sections.

    Padding rows are among them: zeros are written for these. 8-bit pairs take all rows at once.
    Returns what will be read, fp32 [K / g, rows]; zeros for padding rows.
    """
    groups, rows = values.shape
    real = min(rows, projection.rows - start)  # rows that are no padding
    component = sections[f"{projection.name}.pairs"][:, start : start + rows, which]  # [K / g, rows]
    if projection.pairs == "bfloat16":
        component[:, :real] = values[:, :real]
    else:
        assert rows == projection.padded_rows
        # padding repeats a real value: it must not widen the range of its run
        padded = F.pad(values[:, :real], (0, rows - real), mode="replicate").reshape(1, -1)
        scales = sections[f"{projection.name}.pair_scales"]
        runs = F.pad(padded, (0, len(scales) * PAIR_BLOCK - padded.shape[1]), mode="replicate").view(-1, PAIR_BLOCK)
        low, high = runs.aminmax(dim=1)
        scales[:, which, 0] = (high - low) / 255
        scales[:, which, 1] = low
        scale, minimum = scales[:, which].float().unsqueeze(2).unbind(1)  # [runs, 1] each
        codes = torch.where(scale > 0, (runs - minimum) / scale, 0.0).round_().clamp_(0, 255)
        component[:, :real] = codes.view(-1)[: padded.shape[1]].view(groups, -1)[:, :real]
    component[:, real:] = 0
    read = load_pairs(projection, sections, start, start + rows)[:, :, which].float()
    read[:, real:] = 0
    return read


def load_pairs(projection: Projection, sections: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """bf16 [K / g, stop - start, 2]: the pairs of these rows, as torch's int4 kernel takes them for all rows."""
    pairs = sections[f"{projection.name}.pairs"]
    if projection.pairs == "bfloat16":
        return pairs[:, start:stop]
    scales = sections[f"{projection.name}.pair_scales"].float()  # [runs, 2, 2]
    groups, rows, _ = pairs.shape
    first = torch.arange(groups, device=pairs.device)[:, None] * rows
    run = (first + torch.arange(start, stop, device=pairs.device)) // PAIR_BLOCK  # [K / g, rows]
    scale, minimum = scales[run].unbind(3)  # [K / g, rows, 2] each
    return (pairs[:, start:stop].float().mul_(scale).add_(minimum)).bfloat16()
