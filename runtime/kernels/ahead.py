"""Compile a model's kernels before it is loaded, in a thread beside imports and reading.

LLVM takes as long to compile them as a third of the imports. It runs without the GIL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

import torch

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.jit.emitter import FloatType
from moetier.runtime.kernels.jit.processor import refusal, this_processor
from moetier.runtime.kernels.jit.team import compiled
from moetier.runtime.kernels.layer.attention_code import attention_kernel
from moetier.runtime.kernels.layer.heads import heads_kernel
from moetier.runtime.kernels.layer.norm import Scale, norm_kernel, norm_task_kernel
from moetier.runtime.kernels.products.gemm import multiplies, product_kernel, variant_of
from moetier.runtime.kernels.products.gemm_tile import PackedVariant
from moetier.runtime.kernels.products.gemv import gemv_kernel
from moetier.runtime.kernels.products.matmul import matmul_kernel
from moetier.runtime.kernels.products.rounding import Rounding, rounding_kernel
from moetier.tiers.extents.table import read_table
from moetier.tiers.headers.gguf import SUFFIX, read_gguf
from moetier.tiers.layout import GGUF_BLOCKS, Projection
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_json, read_manifest, store_folder
from moetier.tiers.threads import start_thread


def compile_ahead(location: Path) -> None:
    """Begin to compile what the model at ``location`` probably needs on a CPU for its first token, and return.

    ``location`` is a model directory or a GGUF file.

    The process ends only when all is compiled. Errors are ignored here: they are raised again where a kernel is needed.
    """

    def work() -> None:
        with contextlib.suppress(Exception):
            if refusal():
                return
            if location.suffix == SUFFIX:
                table = read_table(location)
                _compile(table.manifest if table else None, torch.bfloat16, _matrices(location))
            else:
                is_bf16 = read_json(location / "config.json").get("dtype") == "bfloat16"
                _compile(read_manifest(store_folder(location)), torch.bfloat16 if is_bf16 else torch.float32)

    start_thread("moetier-ahead", work, daemon=False)


def _matrices(path: Path) -> set[Projection]:
    """Return projections like the matrices in a GGUF file that belong to the trunk."""
    projections = set()
    for entry in read_gguf(path).tensors.values():
        stored = GGUF_BLOCKS.get(coding := entry.ggml_type.lower())
        if stored is not None and len(entry.shape) == 2:
            rows, columns = entry.shape
            projections.add(Projection("", rows, columns, stored.bits, group=stored.group, coding=coding))
    return projections


def _compile(manifest: Manifest | None, dtype: torch.dtype, matrices: Collection[Projection] = ()) -> None:
    processor = this_processor()
    pairs = processor.multiplies_pairs and dtype == torch.bfloat16
    norm_kernel(dtype, Scale.ROUNDED)
    for adds in (False, True):
        norm_task_kernel(dtype, Scale.ROUNDED, adds)
    for has_few_rows in (True, False):
        attention_kernel(processor, dtype, pairs, has_few_rows, dtype, False)
    for scale in (None, Scale.ROUNDED):
        heads_kernel(dtype, scale, has_codes=False)
    for p in matrices:
        if multiplies(p):
            product_kernel(processor, variant_of(p, FloatType.of(dtype)))
            rounding_kernel(processor, Rounding.of(p), FloatType.of(dtype))
    for layout in manifest.layouts.values() if manifest else ():
        activation = Activation()
        if ExpertKernels.can_compile(layout, activation):
            ExpertKernels(layout, activation, dtype, 0, processor)
    if manifest and (trunk := manifest.trunk_records) is not None:
        product_kernel(processor, PackedVariant(trunk.bits, trunk.group, trunk.pairs, FloatType.of(dtype)))
        rounding_kernel(processor, Rounding(trunk.group), FloatType.of(dtype))
    compiled(processor)
    for kept in {dtype, torch.float32}:  # of weights of the trunk, and of routers that predict
        gemv_kernel(processor, dtype, kept, kept, kept == dtype and pairs)
    matmul_kernel(processor, dtype, dtype, dtype, pairs)
