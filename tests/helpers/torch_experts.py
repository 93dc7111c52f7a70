"""The two launches of ``runtime/kernels/triton_experts.py`` in torch, on a CPU: one expert after the other, in fp32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import activate
from moetier.tiers.layout import RecordLayout
from moetier.tiers.quant.codec import sections


class TorchExperts:
    """Takes the place of ``SlotExperts``."""

    def __init__(self, layout: RecordLayout, activation: Activation, experts: int) -> None:
        self.layout, self.activation, self.experts = layout, activation, experts

    def begin(self, x: Tensor, index: Tensor, weights: Tensor) -> TorchSums:
        assert x.is_contiguous() and index.is_contiguous() and weights.is_contiguous()  # noqa: PT018  # no test
        assert index.dtype == torch.int64
        return TorchSums(self, x, index, weights)


class TorchSums:
    def __init__(self, kernels: TorchExperts, x: Tensor, index: Tensor, weights: Tensor) -> None:
        self._kernels, self._x, self._index, self._weights = kernels, x, index, weights
        self._products = Kernels(x.device)
        self._outputs = torch.zeros((index.numel(), x.shape[1]))

    def add(self, table: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # this is the device's work: the host does not wait for it
            self._add(table)

    def _add(self, table: Tensor) -> None:
        assert table.shape == (self._kernels.experts,)
        assert table.dtype == torch.int64
        for expert, address in enumerate(table.tolist()):
            pairs = (self._index.reshape(-1) == expert).nonzero()[:, 0]
            if address and len(pairs):
                data = bytearray(ctypes.string_at(address, self._kernels.layout.record_bytes))
                y = self._compute(torch.frombuffer(data, dtype=torch.uint8), pairs)
                self._outputs[pairs] = y * self._weights.reshape(-1, 1)[pairs].float()

    def _compute(self, record: Tensor, pairs: Tensor) -> Tensor:
        activation = self._kernels.activation
        y = self._project(
            self._x[pairs // self._index.shape[1]].float(), record, "gate_up_proj" if activation.gated else "up_proj"
        )
        return self._project(activate(activation, y), record, "down_proj")

    def _project(self, x: Tensor, record: Tensor, name: str) -> Tensor:
        layout = self._kernels.layout
        bias = sections(record, layout).get(f"{name}_bias")
        y = self._products.project(x, record, layout, name)
        return y if bias is None else y + bias.float()

    def result(self) -> Tensor:
        return self._outputs.view(*self._index.shape, -1).sum(1).to(self._x.dtype)
