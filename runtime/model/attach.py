"""Attach the tiers to a model whose trunk is loaded: its blocks then compute with experts of the tiers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moetier.runtime.config import SpeculationMode, TierConfig
from moetier.runtime.devices.device import ComputeDevice, MemoryDevice, device_at
from moetier.runtime.kernels.layer.attention import use_causal_attention
from moetier.runtime.kernels.layer.growing_cache import use_growing_layers
from moetier.runtime.kernels.layer.norm import use_quick_norms
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.products.row import use_row_weights
from moetier.runtime.kernels.slots import Form
from moetier.runtime.libraries.transformers_internals import forget_quantised
from moetier.runtime.machine.memory import memory_for_model
from moetier.runtime.machine.threads import threads_for
from moetier.runtime.moe.activation import activation_of
from moetier.runtime.moe.block import TieredBlock, refuse_copy
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.gates import Gates
from moetier.runtime.moe.layers import use_quick_layers
from moetier.runtime.moe.linear import QuantizedLinear, quantized_linears
from moetier.runtime.moe.quick import quick_activation
from moetier.runtime.moe.routers import use_quick_routers
from moetier.runtime.speculation.predictor import Shortcuts
from moetier.runtime.speculation.speculation import Speculation
from moetier.tiers.closeable import closed_on_error
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest

from .budgets import Needs
from .tiers import Tiers, close_later
from .trunk_files import TrunkFiles, mapped_bytes


def attach_tiers(
    model: PreTrainedModel, location: Path, manifest: Manifest, files: TrunkFiles, config: TierConfig
) -> None:
    """Open the tiers of a model, and attach them as ``model.tiers``.

    Args:
        model: its trunk is loaded; its experts have no parameters.
        location: its model directory, checkpoint folder or GGUF file.
        manifest: the manifest of its store.
        files: the trunk's files. They are closed if nothing in memory needs them.
        config: the options of the tiers.

    Raises the errors of ``Tiers.open``, StoreFormatError if a file of the trunk has changed, and ConfigError if the
    trunk is on several devices, or on one on which moetier can't compute. After an error the tiers are closed, and
    torch has as many threads as before.
    """
    with threads_for(config.threads):
        _attach(model, location, manifest, files, config)


def _attach(model: PreTrainedModel, location: Path, manifest: Manifest, files: TrunkFiles, config: TierConfig) -> None:
    """As ``attach_tiers``, with the number of threads that it has set."""
    device = device_at(_device_of(model), config.device)
    kernels = device.kernels(exact=config.exact)
    linears = quantized_linears(model)
    for linear in linears:
        linear.compute_with(kernels)
    shortcuts = _shortcuts(model, config)  # before the tiers, as this memory is then not free
    of_experts = kernels if config.exact else _expert_kernels(model, manifest, device, kernels)
    tiers = _open_tiers(model, location, manifest, files, config, device, of_experts, linears)
    with closed_on_error(tiers):
        files.finish_load(model, is_shared=tiers.origin.daemon is not None)
        if shortcuts is not None:
            _speculate(shortcuts, config, device, tiers, experts_modules(model))
        layouts = [*tiers.manifest.layouts.values(), *(linear.layout for linear in linears)]
        if any(kernels.packs(layout) for layout in layouts):  # else the model computes bit for bit as the eager one
            _use_compiled_code(model, config)
        tiers.hooks.add(model.register_forward_pre_hook(lambda *_: files.check()))
        _attach_blocks(model, tiers, device.torch_device)
        _keep(model, tiers)


def _device_of(model: PreTrainedModel) -> torch.device:
    """Return the trunk's device. Raises ConfigError if the trunk is on several devices."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ConfigError(
            f"The trunk is spread over {', '.join(sorted(map(str, devices)))}.",
            'Load it on one device: name one for all of it, device_map={"": DEVICE}, or give none for the CPU.',
        )
    return devices.pop()


def _expert_kernels(model: PreTrainedModel, manifest: Manifest, device: ComputeDevice, trunk: Kernels) -> Kernels:
    """Return the device's kernels for experts in slots, if they know the activations of all blocks, else ``trunk``.

    Records are arranged for the kernels when they are copied, so this is decided before the tiers are opened.
    """
    modules, forms = experts_modules(model), list[Form]()
    for number, block in enumerate(manifest.blocks):
        if (activation := activation_of(modules[block.path])) is None:
            return trunk
        forms.append(Form(manifest.layout(number), activation, model.dtype))
    return device.slot_kernels(trunk, forms) or trunk


def _open_tiers(
    model: PreTrainedModel,
    location: Path,
    manifest: Manifest,
    files: TrunkFiles,
    config: TierConfig,
    device: ComputeDevice,
    kernels: Kernels,
    linears: list[QuantizedLinear],
) -> Tiers:
    """Open the tiers, which close when the model is garbage-collected. ``linears``: the trunk's quantised matrices."""
    needs = Needs.of(
        model,
        manifest,
        config,
        kernels,
        available=device.free_memory() if isinstance(device, MemoryDevice) else memory_for_model(),
        trunk=mapped_bytes(model),
        matrices=[linear.layout for linear in linears],
    )
    tiers = Tiers.open(location, manifest, config, device, needs=needs, kernels=kernels, trunk_files=files)
    weakref.finalize(model, close_later, tiers.close_sources, weakref.ref(tiers))
    return tiers


def _keep(model: PreTrainedModel, tiers: Tiers) -> None:
    """Keep the tiers as an attribute of the model. From then on the model can't be copied."""
    model.__dict__["tiers"] = tiers  # bypasses nn.Module.__setattr__: neither a submodule nor a parameter
    model.__dict__["__reduce_ex__"] = refuse_copy  # copy and pickle call it
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # some layers compute in another order if this is set
            forget_quantised(module.config)


def _shortcuts(model: PreTrainedModel, config: TierConfig) -> Shortcuts | None:
    """Return the shortcuts that predict experts; None if speculation is off, or if no gate can predict."""
    if config.speculate is SpeculationMode.OFF:
        return None
    gates = Gates(model)
    if (refusals := gates.refusals()) is not None:
        warnings.warn(f"{type(model).__name__}: {refusals}", RuntimeWarning, stacklevel=2)
    return Shortcuts(gates) if gates.first is not None else None


def _speculate(
    shortcuts: Shortcuts, config: TierConfig, device: ComputeDevice, tiers: Tiers, modules: Mapping[str, Any]
) -> None:
    """Begin to predict experts. ``modules``: the Experts modules by path."""
    tiers.speculate(
        Speculation(
            shortcuts,
            tiers.source,
            look_ahead=config.look_ahead,
            mode=_mode(config, tiers, modules),
            most=config.prefetch,
            is_queued=device.has_memory,
        )
    )


def _mode(config: TierConfig, tiers: Tiers, modules: Mapping[str, Any]) -> SpeculationMode:
    """Return when to speculate.

    The default mode is OFF if a daemon on another host computes missing experts, as their records are not fetched then.
    ``modules`` is as in ``_speculate``.
    """
    if (
        config.speculate is SpeculationMode.AUTO
        and tiers.origin.remote_compute is not None
        and tiers.origin.remote_compute.is_possible
    ):
        for number, block in enumerate(tiers.manifest.blocks):
            if quick_activation(modules[block.path], tiers.manifest.layout(number), tiers.kernels) is not None:
                return SpeculationMode.OFF
    return config.speculate


def _use_compiled_code(model: PreTrainedModel, config: TierConfig) -> None:
    """Let compiled code do the work of modules for which it gives the same results as their own."""
    use_causal_attention(model, same_bits=config.same_bits)
    use_growing_layers(model)
    use_quick_norms(model)
    use_row_weights(model, same_bits=config.same_bits)
    use_quick_routers(model)
    use_quick_layers(model)


def _attach_blocks(model: PreTrainedModel, tiers: Tiers, device: torch.device) -> None:
    """Give each Experts module its block of the tiers, to be computed on ``device``."""
    modules = experts_modules(model)
    on_demand = None if tiers.speculation is None else tiers.speculation.on_demand
    blocks = tiers.manifest.blocks
    for number, block in enumerate(blocks):
        layout = tiers.manifest.layout(number)
        following = range(blocks[number + 1].experts) if number + 1 < len(blocks) else ()
        modules[block.path].tiered = TieredBlock(
            number,
            layout,
            tiers.source,
            tiers.kernels,
            device,
            on_demand,
            following=[ExpertKey(number + 1, expert) for expert in following],
            remote_compute=tiers.origin.remote_compute,
        )
