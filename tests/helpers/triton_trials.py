"""Trials of ``runtime/kernels/triton_experts.py`` in an environment with Triton, without a GPU.

``python triton_trials.py random FIRST END`` computes random blocks in Triton's interpreter, on tensors of a CPU; each
number is another block. ``python triton_trials.py models`` computes those of tiny models, and ``python
triton_trials.py model FOLDER`` a whole model on the simulated device. ``python triton_trials.py compile`` compiles the
kernels for two GPUs, of which none is needed, and prints what their code has.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0" if sys.argv[1] == "compile" else "1"

import torch
import triton
from slot_trials import check_model, models, trial
from triton.backends.compiler import GPUTarget
from triton_interpreter import SlotExperts

from moetier.runtime.kernels import triton_experts
from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.tiers.layout import Projection, RecordLayout


class NoDriver:
    """Stands in for the driver of a GPU: kernels are compiled for it, and not launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _: int) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: compiles it for what would be launched, and prints what its code has."""

    def __init__(self, kernel: Any, what: str) -> None:
        self.kernel, self.what = kernel, what

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*given, grid=grid, **constants)
            ptx = compiled.asm["ptx"]
            assert compiled.asm["cubin"]
            wide = len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\S* \[.*, 0x10|cp\.async\S*16", ptx))
            narrow = len(re.findall(r"ld\.global\S*\.b8\b", ptx))
            rounds, cuts = (int(f"cvt.{way}.bf16" in ptx) for way in ("rn", "rz"))
            print(self.kernel.__name__, self.what, wide, narrow, rounds, cuts)

        return launch


def compile_kernels() -> None:
    """Compile all kernels for GPUs of the compute capabilities 8.0 and 9.0, with the shapes of Qwen3-30B-A3B."""
    kernels = {name: getattr(triton_experts, name) for name in ("_gate_up", "_down")}
    for capability, group, tokens in itertools.product((80, 90), (0, 64), (1, 64)):
        triton.runtime.driver.set_active(NoDriver(capability))
        for name, kernel in kernels.items():
            setattr(triton_experts, name, Compiled(kernel, f"{capability} {group} {tokens}"))
        names = (("gate_up_proj", 1536, 2048), ("down_proj", 2048, 768))
        pairs = "bfloat16" if group else ""
        layout = RecordLayout(tuple(Projection(*n, 4 if group else 16, group=group, pairs=pairs) for n in names))
        block, index = SlotExperts(layout, Activation(), 128), torch.zeros(tokens, 8, dtype=torch.int64)
        x, weights = torch.zeros(tokens, 2048, dtype=torch.bfloat16), torch.zeros(tokens, 8)
        block.begin(x, index, weights).add(torch.zeros(128, dtype=torch.int64))


def main() -> None:
    match sys.argv[1:]:
        case ["random", first, end]:
            for number in range(int(first), int(end)):
                trial(SlotExperts, number)
                print(number, flush=True)
        case ["models"]:
            models(SlotExperts)
        case ["model", folder]:
            check_model(SlotExperts, Path(folder))
        case ["compile"]:
            compile_kernels()


if __name__ == "__main__":
    main()
