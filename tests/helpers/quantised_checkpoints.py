"""Checkpoints in FP8 and MXFP4, as they are published, made of tiny ones of one shard."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import edit_json, edit_tensors
from torch import Tensor

BLOCK = 8
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def to_fp8(weight: Tensor, rows: int = BLOCK, columns: int = BLOCK) -> tuple[Tensor, Tensor]:
    """[N, K] -> FP8 [N, K] and a scale for each block, edge blocks included."""
    n, k = weight.shape
    padded = torch.zeros(-(-n // rows) * rows, -(-k // columns) * columns)
    padded[:n, :k] = weight.float()
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = (tiles.abs().amax((1, 3)) / 448).clamp_min(1e-12)
    codes = (tiles / scale[:, None, :, None]).view_as(padded)[:n, :k]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def quantised(name: str) -> bool:
    return name.endswith("_proj.weight") and "norm" not in name and "lm_head" not in name


def quantise_fp8(folder: Path, scale_name: str = "{}_scale_inv") -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if quantised(name)]:
            tensors[name], tensors[scale_name.format(name)] = to_fp8(tensors[name])

    edit_tensors(folder, edit)
    edit_json(folder / "config.json", quantization_config=FP8)


def quantise_mxfp4(folder: Path) -> None:
    """The experts of a gpt_oss, with codes and scales at random."""
    random = torch.Generator().manual_seed(0)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            groups = -(-inputs // 32)
            assert inputs % 32 == 0
            tensors[f"{name}_blocks"] = torch.randint(
                0, 256, (experts, outputs, groups, 16), dtype=torch.uint8, generator=random
            )
            tensors[f"{name}_scales"] = torch.randint(
                118, 124, (experts, outputs, groups), dtype=torch.uint8, generator=random
            )

    edit_tensors(folder, edit)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped})
