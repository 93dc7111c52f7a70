"""Tiny checkpoints in the quantised forms in which models are published, each with one of the decoded weights.

compressed-tensors and transformers write and decode their own forms, DeepSeek's and FP8 blocks among the latter. FP4 of
DeepSeek-V4 and NVFP4 of ModelOpt are made byte by byte; ``own_tools.py`` lets ModelOpt itself write the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from architectures import tiny_config, tiny_model
from checkpoints import edit_json, edit_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from quantised_checkpoints import quantise_mxfp4
from torch import Tensor
from transformers import DeepseekV3Config, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers import AutoHfQuantizer

Form = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # weight [N, K] -> stored tensors by suffix, decoded weight
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp4_codes(values: Tensor) -> Tensor:
    """[N, K] -> [N, K / 2] uint8: the nearest FP4 values, the first in the low half of a byte."""
    codes = (values[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def exponents(weight: Tensor, group: int, largest: float) -> tuple[Tensor, Tensor]:
    """[N, K] -> bytes of powers of two [N, K / group], and the weights in their unit."""
    groups = weight.float().unflatten(1, (-1, group))
    power = (groups.abs().amax(2) / largest).clamp_min(2**-120).log2().ceil()
    return (power + 127).to(torch.uint8), (groups / power.exp2()[..., None]).flatten(1)


def deepseek_fp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """DeepSeek-V4's experts."""
    scale, values = exponents(weight, 32, 6.0)
    codes = fp4_codes(values).view(torch.int8)
    stored = {"weight": codes, "scale": scale.view(torch.float8_e8m0fnu)}
    return stored, Fp8Dequantize(None)._dequantize_one(codes, stored["scale"], torch.bfloat16)


def fp8(block: tuple[int, int] | None, *, powers: bool, scale: str = "weight_scale_inv") -> Form:
    """FP8 in blocks, or in one, as transformers writes it. ``powers``: scales are powers of two."""
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt="ue8m0" if powers else "float")
    quantizer = AutoHfQuantizer.from_config(config)

    def form(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = Fp8Quantize(quantizer).convert({"weight": weight}).values()
        return {"weight": codes, scale: scales}, Fp8Dequantize(quantizer)._dequantize_one(codes, scales, torch.bfloat16)

    return form


def mxfp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Quantise to MXFP8, with scales as bytes."""
    stored, made = fp8((1, 32), powers=True)(weight)
    return stored | {"weight_scale_inv": stored["weight_scale_inv"].view(torch.uint8)}, made


def modelopt_nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """NVIDIA's TensorRT Model Optimizer: weight_scale_2 is multiplied with."""
    groups = weight.float().unflatten(1, (-1, 16))
    whole = groups.abs().amax() / (6 * 448)
    scale = (groups.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    unit = scale.float() * whole
    codes = fp4_codes((groups / unit.clamp_min(1e-30)[..., None]).flatten(1))
    values = E2M1[torch.stack((codes & 15, codes >> 4), 2).flatten(1).long()]
    stored = {"weight": codes, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(1.0)}
    return stored, (values * unit.repeat_interleave(16, 1)).bfloat16()


def compressed(format_: str, **arguments: Any) -> Form:
    """A form of compressed-tensors, by its own code."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=format_)
    compressor = BaseCompressor.get_value_from_registry(format_)

    def form(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values = weight.float()
        state: dict[str, Tensor] = {"weight": weight}
        match arguments["strategy"]:
            case "channel":
                limit = 448.0 if arguments["type"] == "float" else 7.0
                state["weight_scale"] = (values.abs().amax(1, keepdim=True) / limit).bfloat16()
            case "group":
                largest = values.unflatten(1, (-1, arguments["group_size"])).abs().amax(2)
                if format_.startswith("mxfp4"):
                    state["weight_scale"] = (largest / 6).log2().ceil().exp2().bfloat16()
                else:
                    state["weight_scale"] = (largest / 7).bfloat16()
            case "tensor_group":
                largest = values.unflatten(1, (-1, 16)).abs().amax(2)
                state["weight_global_scale"] = (448 * 6 / values.abs().amax()).view(1)
                scale = largest / 6 * state["weight_global_scale"]
                state["weight_scale"] = scale.to(torch.float8_e4m3fn).float()
        stored = compressor.compress(dict(state), scheme)
        made = compressor.decompress(dict(stored), scheme)["weight"]
        return {name: tensor.contiguous() for name, tensor in stored.items()}, made.to(torch.bfloat16)

    return form


def config_of(format_: str, **arguments: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": arguments, "format": format_}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
MXFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}

# model type, form of experts, form of other matrices (None: 16 bits), quantization_config
FORMS: dict[str, tuple[str, Form | None, Form | None, dict[str, Any]]] = {
    "gpt-oss": ("gpt_oss", None, None, {}),
    "deepseek-v4": (
        "deepseek_v4",
        deepseek_fp4,
        fp8(None, powers=True, scale="scale"),
        FP8 | {"weight_block_size": [128, 128]},
    ),
    "kimi-k2.5": ("kimi_k25", compressed("pack-quantized", **INT4), None, config_of("pack-quantized", **INT4)),
    "fp8-block": ("qwen3_moe", *(fp8((16, 32), powers=False),) * 2, FP8 | {"weight_block_size": [16, 32]}),
    "fp8-channel": (
        "qwen3_moe",
        *(compressed("float-quantized", **CHANNEL),) * 2,
        config_of("float-quantized", **CHANNEL),
    ),
    "mxfp8": ("qwen3_moe", mxfp8, mxfp8, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "mxfp4": (
        "qwen3_moe",
        *(compressed("mxfp4-pack-quantized", **MXFP4),) * 2,
        config_of("mxfp4-pack-quantized", **MXFP4),
    ),
    "nvfp4": (
        "qwen3_moe",
        *(compressed("nvfp4-pack-quantized", **NVFP4),) * 2,
        config_of("nvfp4-pack-quantized", **NVFP4),
    ),
    "nvfp4-modelopt": (
        "qwen3_moe",
        modelopt_nvfp4,
        modelopt_nvfp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
}


def save_native(folder: Path, format_name: str) -> tuple[Path, Path]:
    """A checkpoint in one file, and one in 16 bits with the same weights, as the form's own decoder makes them."""
    model_type, of_experts, of_others, quantization = FORMS[format_name]
    native, decoded = folder / "native", folder / "decoded"
    sizes: dict[str, Any] = {"moe_intermediate_size": 64, "intermediate_size": 64}
    if model_type == "kimi_k25":
        sizes = {"text_config": tiny_config(DeepseekV3Config, **sizes).to_dict()}
    tiny_model(model_type, torch.bfloat16, **sizes).save_pretrained(native)
    if format_name == "gpt-oss":
        quantise_mxfp4(native)
        copytree(native, decoded)
        edit_tensors(decoded, decode_mxfp4)
        edit_json(decoded / "config.json", quantization_config=None)
        return native, decoded
    copytree(native, decoded)
    made = quantise(native, of_experts, of_others, quantization)
    edit_tensors(decoded, lambda tensors: tensors.update(made))
    return native, decoded


def quantise(
    folder: Path, of_experts: Form | None, of_others: Form | None, quantization: dict[str, Any]
) -> dict[str, Tensor]:
    """Write the weights of a checkpoint of one file in a form. Returns the decoded weights by name."""
    made: dict[str, Tensor] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight") and tensors[name].ndim == 2]:
            expert = ".experts." in name
            write = of_experts if expert else of_others
            if write is None or not (expert or any(part in name for part in ("_proj.", "attn.w", "shared_experts."))):
                continue
            stored, made[name] = write(tensors.pop(name))
            tensors |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in stored.items()}

    edit_tensors(folder, edit)
    edit_json(folder / "config.json", quantization_config=quantization)
    return made


def decode_mxfp4(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(f"{stem}_scales")
        tensors[stem] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
