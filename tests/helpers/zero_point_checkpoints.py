"""Checkpoints as HQQ, AWQ and GPTQ write them, made of tiny ones of one shard. hqq writes its own. Codes of the others
are packed bit by bit; ``own_tools.py`` lets AutoAWQ and GPTQModel pack them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import edit_json, edit_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# from the name and the weights of a linear module to its tensors by their last names, and the weights that they mean
Quantiser = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
HQQ = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}


def is_quantised(name: str) -> bool:
    return name.endswith((".w1.weight", ".w2.weight", ".w3.weight", "_proj.weight"))


def quantise(folder: Path, plain: Path, quantiser: Quantiser, quantization: dict[str, Any]) -> None:
    """Quantise a checkpoint's linear modules. ``plain`` becomes one with the weights that it then means."""
    shutil.copytree(folder, plain)
    meant: dict[str, Tensor] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if is_quantised(name)]:
            weight = tensors.pop(name)
            own, meant[name] = quantiser(name, weight)
            meant[name] = meant[name].to(weight.dtype).contiguous()
            tensors |= {f"{name.removesuffix('weight')}{leaf}": tensor for leaf, tensor in own.items()}

    edit_tensors(folder, edit)
    edit_tensors(plain, lambda tensors: tensors.update(meant))
    edit_json(folder / "config.json", quantization_config=quantization)


def packed(codes: Tensor, bits: int) -> Tensor:
    """[n, m] -> int32 [n, m * bits / 32]: one code after the other, each from its lowest bit on."""
    spread = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    words = np.packbits(spread.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(words.view("<i4").copy())


def gptq(weight: Tensor, bits: int = 4, group: int = 32, **how: Any) -> tuple[dict[str, Tensor], Tensor]:
    """``how``: form, symmetric, dtype of scales, and order: the group of each column."""
    columns = weight.shape[1]
    group = columns if group == -1 else group
    order = how.get("order", torch.arange(columns) // group)
    codes, scales, zeros = rounded(weight.float(), bits, order, how.get("symmetric", False), how.get("dtype"))
    less = 1 if how.get("form", "gptq") == "gptq" else 0
    tensors = {
        "qweight": packed(codes, bits).T.contiguous(),
        "qzeros": packed(zeros.T - less, bits),
        "scales": scales.T.contiguous(),
        "g_idx": order.int(),
    }
    return tensors, dequantised(codes, scales[:, order], zeros[:, order])


def awq(weight: Tensor, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    columns = weight.shape[1]
    order = torch.arange(columns) // (columns if group == -1 else group)
    codes, scales, zeros = rounded(weight.float(), 4, order, False, None)

    def columnwise(values: Tensor) -> Tensor:
        words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
        for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= values[:, column::8].long() << (4 * i)
        return words.to(torch.int32)

    tensors = {"qweight": columnwise(codes.T), "qzeros": columnwise(zeros.T), "scales": scales.T.contiguous()}
    return tensors, dequantised(codes, scales[:, order], zeros[:, order])


def rounded(
    weight: Tensor, bits: int, order: Tensor, symmetric: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K]; scales and zero points [N, groups]."""
    parts = []
    for group in range(int(order.max()) + 1):
        low, high = weight[:, order == group].aminmax(dim=1)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high.clamp_min(0) - low.clamp_max(0)).clamp_min(1e-4) / (2**bits - 1)).to(dtype or torch.float16)
        zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
        parts.append((scale, zero.clamp(1, 2**bits - 1).int()))
    scales, zeros = (torch.stack(each, 1) for each in zip(*parts, strict=True))
    codes = (weight / scales[:, order] + zeros[:, order]).round().clamp(0, 2**bits - 1).int()
    return codes, scales, zeros


def dequantised(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the weights, computed as AutoAWQ and GPTQModel do."""
    return (codes - zeros) * scales


def hqq(
    weight: Tensor, nbits: float = 4, group: int = 16, axis: int = 1, **how: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors that hqq's linear module saves, and what it dequantises. ``how``: dtype, and view_as_float."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    settings = BaseQuantizeConfig(
        nbits=nbits, group_size=group, axis=axis, view_as_float=how.get("view_as_float", False)
    )
    made = HQQLinear(linear, settings, compute_dtype=how.get("dtype", torch.bfloat16), device="cpu")
    state = {name: tensor.data.clone() for name, tensor in made.state_dict().items()}
    return state, made.dequantize()


def offloaded(weight: Tensor, nbits: int, group: int, scales_group: int) -> tuple[dict[str, Tensor], Tensor]:
    """As the code of mixtral-offloading saves a matrix: axis 0, with quantised scales and zero points, in fp16."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(weight, nbits=nbits, group_size=group, axis=0, device="cpu")
    half: dict[str, Any] = {"compute_dtype": torch.float16, "view_as_float": False}
    state, read = {"W_q": codes}, {}
    for name, settings in (
        ("scale", {"channel_wise": True, "group_size": scales_group}),
        ("zero", {"channel_wise": False, "group_size": None}),
    ):
        again, own = Quantizer.quantize(meta[name], nbits=8, optimize=False, device="cpu", **settings)
        own |= half | {"scale": own["scale"].half(), "zero": own["zero"].half()}
        read[name] = Quantizer.dequantize(again, own)
        state |= {
            f"meta.{name}_q": again,
            f"meta.meta_{name}.scale": own["scale"],
            f"meta.meta_{name}.zero": own["zero"],
        }
    return state, Quantizer.dequantize(codes, meta | half | read)


def quantise_as_mixtral_offloading(folder: Path, plain: Path) -> None:
    """Experts in 2 bits and attention in 4, in a file for each expert, with names within the expert, and one for the
    rest; names in the index are whole. The config does not say that anything is quantised."""
    quantise(
        folder,
        plain,
        lambda name, weight: offloaded(weight, 4, 64, 16) if "_proj" in name else offloaded(weight, 2, 16, 32),
        {},
    )
    edit_json(folder / "config.json", quantization_config=None)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files: dict[str, dict[str, Tensor]] = {}
    places = {}
    for name, tensor in tensors.items():
        expert = re.match(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.", name)
        file = f"expert-{expert[1]}-{expert[2]}.safetensors" if expert else "trunk.safetensors"
        files.setdefault(file, {})[name.removeprefix(expert[0]) if expert else name] = tensor
        places[name] = file
    for file, members in files.items():
        save_file(members, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
