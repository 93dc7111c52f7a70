"""Compile a model's kernels before it is loaded, in a thread beside imports and reading.

LLVM takes as long to compile them as a third of the imports. It runs without the GIL.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import torch

from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_json, read_manifest, store_folder

from .attention_code import attention_kernel
from .expert_code import Activation
from .expert_kernels import ExpertKernels
from .gemm import product_kernel, rounding_kernel
from .gemm_tile import Form
from .gemv import gemv_kernel
from .heads import heads_kernel
from .jit import refusal, this_processor
from .norm import Scale, norm_kernel
from .team import compiled


def compile_ahead(folder: Path) -> None:
    """Begin to compile what the model in ``folder`` probably needs on a CPU for its first token, and return.

    The process ends only when all is compiled. Errors are ignored here: they are raised again where a kernel is needed.
    """

    def work() -> None:
        with contextlib.suppress(Exception):
            if not refusal():
                is_bf16 = read_json(folder / "config.json").get("dtype") == "bfloat16"
                _compile(read_manifest(store_folder(folder)), torch.bfloat16 if is_bf16 else torch.float32)

    threading.Thread(target=work, name="moetier-compiler").start()


def _compile(manifest: Manifest, dtype: torch.dtype) -> None:
    processor = this_processor()
    norm_kernel(dtype, Scale.ROUNDED)
    attention_kernel(dtype)
    for scale in (None, Scale.ROUNDED):
        heads_kernel(dtype, scale)
    for layout in manifest.layouts.values():
        activation = Activation()
        if ExpertKernels.fit(layout, activation):
            ExpertKernels(layout, activation, dtype, 0, processor)
    if (form := manifest.trunk_records) is not None:
        product_kernel(processor, Form(form.bits, form.group, form.pairs, dtype))
        rounding_kernel(processor, form.group, dtype)
    compiled(processor)
    for kept in {dtype, torch.float32}:  # of weights of the trunk, and of routers that predict
        gemv_kernel(dtype, kept)
