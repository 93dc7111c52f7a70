"""Let a quantiser that the tests' environment lacks write the experts of a checkpoint of one shard.

``python own_tools.py TOOL CHECKPOINT PLAIN`` quantises the checkpoint with ModelOpt, AutoAWQ or GPTQModel, and makes
``PLAIN`` of the weights that the tool itself dequantises. None of them needs a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from zero_point_checkpoints import AWQ, GPTQ, Quantiser, quantise

# Installed without dependencies: the tests' own environment has the others.
PINS = {
    "modelopt": "nvidia-modelopt==0.47.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 PuLP==3.3.2 scipy==1.17.1",
    "awq": "autoawq==0.2.9 zstandard==0.25.0",
    "gptq": "GPTQModel==7.7.0 PyPcre==0.6.4 Device-SMI==0.5.7 TokeNicer==0.0.14 LogBar==0.4.15 threadpoolctl==3.8.0"
    " Defuser==0.0.28",
}


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.half(), requires_grad=False)
    return made


def modelopt(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    made, scale, whole = NVFP4QTensor.quantize(weight, 16)
    stored = {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": whole}
    return stored, made.dequantize(torch.bfloat16, scale=scale, double_scale=whole, block_sizes={-1: 16})


def awq(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    layer, how = linear(weight), SimpleNamespace(group_size=32, zero_point=True, w_bit=4)
    layer.weight.data, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(how, layer.weight.data)
    made = WQLinear_GEMM.from_linear(layer, 4, 32, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    return dict(made.state_dict()), dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, 32).T


def gptq(packing: str) -> Quantiser:
    def quantiser(_: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        from gptqmodel import QuantizeConfig
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.quantization.gptq import GPTQ as Solver
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        layer, (rows, columns) = linear(weight), weight.shape
        settings = QuantizeConfig(bits=4, group_size=32, desc_act=False, sym=False)
        solver = Solver(layer, settings)
        solver.quantizer.configure(perchannel=True)
        inputs = torch.randn(1, 256, columns, generator=torch.Generator().manual_seed(0)).half()
        solver.add_batch(inputs, layer(inputs))
        layer.weight.data, scales, zeros, order, *_ = solver.quantize()
        made = TorchLinear(4, 32, False, False, columns, rows)
        made.pack(layer, scales, zeros, order)
        made.post_init()
        meant = made.dequantize_weight().T
        if packing == "gptq":
            convert_gptq_v2_to_v1_format_module(made, settings)
        return {name: getattr(made, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, meant

    return quantiser


TOOLS: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "awq": (awq, AWQ),
    "gptq": (gptq("gptq"), GPTQ | {"checkpoint_format": "gptq"}),
    "gptq_v2": (gptq("gptq_v2"), GPTQ | {"checkpoint_format": "gptq_v2"}),
}


def main() -> None:
    tool, folder, plain = sys.argv[1:]
    # AutoAWQ imports it for texts to calibrate with, which are not used here
    datasets: Any = ModuleType("datasets")
    datasets.load_dataset = None
    sys.modules["datasets"] = datasets
    quantiser, quantization = TOOLS[tool]
    quantise(Path(folder), Path(plain), quantiser, quantization)


if __name__ == "__main__":
    main()
