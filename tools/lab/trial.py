"""A checkpoint loaded whole by transformers, whose weights are stored and read back in one way after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from moetier.runtime.checkpoint.files import Checkpoint
from moetier.runtime.moe.experts import EXPERT_PARAMETERS, experts_modules
from moetier.runtime.moe.linear import WEIGHT
from moetier.tiers.errors import UnsupportedModelError
from moetier.tiers.layout import Bits, RecordLayout
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import WeightError, decode, encode, layout_for, sections
from moetier.tools.convert.matrices import Matrices


@dataclass(frozen=True)
class Stored:
    """Each block's layout and number of experts, and how far all weights are off."""

    blocks: tuple[tuple[RecordLayout, int], ...]
    error: WeightError


class Trial:
    """``model`` computes in fp32 and eagerly, so that nothing but its weights ever differs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Holds the experts twice: in fp32, and in the checkpoint's type. Raises UnsupportedModelError."""
        if "quantization_config" in checkpoint.config:
            raise UnsupportedModelError(
                f"{checkpoint.name} is quantised already.",
                "Convert it to 16 bits: its model directory can be measured as it is.",
            )
        name = str(next(iter(checkpoint.config.get("architectures") or []), None))
        if not hasattr(transformers, name):
            raise UnsupportedModelError(
                f"This transformers ({transformers.__version__}) has no architecture {name}.",
                "Give a model that moetier can convert.",
            )
        self.model: Any = getattr(transformers, name).from_pretrained(
            checkpoint.folder, dtype=torch.float32, experts_implementation="eager"
        )
        self._modules = list(experts_modules(self.model).values())
        if not self._modules:
            raise UnsupportedModelError(
                f"{name} has no experts that moetier knows.", "Give a Mixture-of-Experts model."
            )
        # fp32 holds what it was loaded from exactly, so this gives the checkpoint's own weights
        own = str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype", "float32")))
        self._dtype: torch.dtype = getattr(torch, own)
        self._trunk: dict[str, Tensor] = {}  # originals of what was replaced, by module path
        self._originals: list[dict[str, Tensor]] = [
            {name: p.detach().to(self._dtype) for name, p in module.named_parameters() if name in EXPERT_PARAMETERS}
            for module in self._modules
        ]

    @torch.no_grad()
    def store(self, bits: Bits, group: int | None, pairs: str | None, *, fast: bool) -> Stored:
        """Replaces every expert by what is read back of its record."""
        blocks, total = [], WeightError()
        for module, originals in zip(self._modules, self._originals, strict=True):
            parameters = {n: (tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for n, t in originals.items()}
            layout = layout_for(parameters, bits=bits, group=group, pairs=pairs, transposed=module.is_transposed)
            blocks.append((layout, module.num_experts))
            record = np.empty(layout.record_bytes, np.uint8)
            for expert in range(module.num_experts):
                errors = encode({n: t[expert] for n, t in originals.items()}, layout, record, fast=fast)
                total = sum((errors[p.name] for p in layout.projections), total)
                _read_back(module, expert, torch.from_numpy(record), layout)
        return Stored(tuple(blocks), total)

    @torch.no_grad()
    def store_trunk(self, form: TrunkRecords | None, *, fast: bool) -> None:
        """Replaces each matrix of the trunk that a conversion would quantise; None: they are what they were."""
        chosen = Matrices.of(self.model, torch.float32, form).chosen if form else {}
        for path in {**self._trunk, **chosen}:
            linear = self.model.get_submodule(path)
            original = self._trunk.setdefault(path, linear.weight.detach().to(self._dtype))
            weights = original.float()
            if path in chosen:
                record = np.empty(chosen[path].record_bytes, np.uint8)
                encode({WEIGHT: original}, chosen[path], record, fast=fast)
                decode(torch.from_numpy(record), chosen[path], WEIGHT, weights)
            linear.weight = torch.nn.Parameter(weights, requires_grad=False)  # a head is tied no longer


def _read_back(module: Any, expert: int, record: Tensor, layout: RecordLayout) -> None:
    for p in layout.projections:
        decode(record, layout, p.name, getattr(module, p.name)[expert])
    for bias in layout.biases:
        getattr(module, bias.name)[expert].copy_(sections(record, layout)[bias.name])
