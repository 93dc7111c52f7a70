"""Gates of a model's blocks, which can predict a block's experts from a hidden state of an earlier layer.

A block's gate and its Experts module are children of the same module. The residual stream passes a norm of the decoder
layer before the gate. If there are several residual streams, a mixer before the norm combines them. These modules are
called by ``forward``, which bypasses hooks and recorders on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moetier.tiers.closeable import Closeable, closed_on_error

from .experts import experts_modules
from .routers import argument_names

GATE_NAMES = ("gate", "router")
# names of the norm before the gate; the first that the decoder layer has is used
NORM_NAMES = (
    "pre_mlp_layernorm",
    "pre_feedforward_layernorm",
    "pre_ff_layernorm",
    "ffn_norm",
    "norm2",  # dots3_note's vision tower
    "post_attention_layernorm",
    "norm",
    "input_layernorm",  # attention and experts side by side
)
# name of the mixer of several residual streams -> index of the mixed stream among its outputs
MIXERS = {
    "ffn_hc": -1,
    "mlp_hyper_connection": 0,  # qwen4_exp; this one also normalises
}
# class of a decoder layer whose gate takes the residual stream without a norm -> name of the first module that is
# called with the stream in the MoE part
WITHOUT_NORM = {
    "FlexOlmoDecoderLayer": "mlp",
    "Gemma4TextDecoderLayer": "pre_feedforward_layernorm",
    "DiffusionGemmaEncoderTextLayer": "pre_feedforward_layernorm",
    "DiffusionGemmaDecoderTextLayer": "pre_feedforward_layernorm",
}
SEQUENCES = {"AfmoeTokenChoiceRouter"}  # gates that take [batch, length, hidden]; others take [tokens, hidden]
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    "given": lambda probabilities: probabilities,  # the gate returns probabilities in place of logits
}
TRIED_ROWS = 16  # random states with which a gate is tried
SAME = 0.02  # relative tolerance between a gate's bf16 weights and those computed from its logits in fp32


class ExpertChoice(NamedTuple):
    """The experts chosen for tokens, with probabilities. These rank experts; they don't tell how sure a choice is."""

    experts: Tensor  # [tokens, top_k], int64, in the gate's order
    # [tokens, top_k], fp32; the gate's own function of its logits, before any normalisation over the chosen experts
    probabilities: Tensor


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate of one block. If ``refusal`` says why the block can't be predicted, ``gate`` is None."""

    block: int
    path: str  # path of the Experts module
    successor: int | None  # the block at the same path in the next layer
    experts: Any  # the Experts module
    gate: nn.Module | None = None
    mixer: nn.Module | None = None  # mixer of several residual streams; None if there is one stream
    mixed: int = 0  # index of the mixer's output that the norm or the gate takes
    norm: nn.Module | None = None  # norm before the gate; None if there is none
    decoder: nn.Module | None = None  # the decoder layer
    entry: nn.Module | None = None  # the first module of the layer's MoE part, called with the residual stream
    holder: nn.Module | None = None  # module whose attributes are the gate's further arguments
    arguments: tuple[str, ...] = ()  # names of these arguments
    dtype: torch.dtype = torch.float32  # type of the input of the MoE part
    scores: str = ""  # function of the logits: a key of SCORES
    refusal: str | None = None

    @torch.no_grad()
    def predict(self, hidden: Tensor) -> ExpertChoice:
        """Predict the routing of the residual stream [..., hidden], or of several streams [..., streams, hidden].

        The routing is [tokens, top_k]. With the stream at the block's own entry it is the block's exact routing; with
        the stream of an earlier layer it is a prediction.
        """
        output = self.ask(hidden)
        return ExpertChoice(output[2], self.probabilities(output).gather(-1, output[2]))

    def ask(self, hidden: Tensor) -> Any:
        """Return the gate's output for the residual stream [..., hidden]: logits [tokens, experts] and more."""
        assert self.refusal is None, self.refusal
        states = hidden if self.mixer is None else self.mixer.forward(hidden)[self.mixed]
        states = states if self.norm is None else self.norm.forward(states)
        return self.call(states.to(self.dtype))

    def probabilities(self, output: Any) -> Tensor:
        """Return the probabilities of all experts, [tokens, experts] in fp32, from a gate's ``output``.

        The output is logits [tokens, experts], weights [tokens, top_k], experts [tokens, top_k], and perhaps more.
        """
        return SCORES[self.scores](output[0].float())

    def call(self, states: Tensor) -> Any:
        """Return the gate's output for normalised states, such as [tokens, hidden], reshaped as it takes them."""
        assert self.gate is not None
        flat = states.reshape(-1, states.shape[-1])
        shaped = flat.unsqueeze(0) if type(self.gate).__name__ in SEQUENCES else flat
        return self.gate.forward(shaped, *(getattr(self.holder, name) for name in self.arguments))


class Gates:
    """The gates of a loaded model, by block. The blocks are the model's Experts modules in module order."""

    def __init__(self, model: Any) -> None:
        paths = list(experts_modules(model))
        self.blocks = tuple(_gate(model, block, path, paths) for block, path in enumerate(paths))

    def ahead(self, block: int, distance: int) -> int | None:
        """Return the block ``distance`` layers later at the same path; None if there is none that can be predicted."""
        target: int | None = block
        for _ in range(distance):
            target = None if target is None else self.blocks[target].successor
        return target if target is not None and self.blocks[target].refusal is None else None

    @property
    def first(self) -> int | None:
        """The first block from which the block of the next layer can be predicted; None if there is none."""
        return next((gate.block for gate in self.blocks if self.ahead(gate.block, 1) is not None), None)

    def refusals(self) -> str | None:
        """Return a line on the blocks that can't be predicted, with the reasons; None if there are no such blocks."""
        refused = [gate for gate in self.blocks if gate.refusal is not None]
        if not refused:
            return None
        reasons = " ".join(dict.fromkeys(f"{gate.refusal}" for gate in refused))
        return f"{len(refused)} of {len(self.blocks)} blocks can't be predicted: {reasons}"

    def observe(
        self,
        *,
        layer: Callable[[int, Tensor], None] | None = None,
        entry: Callable[[int, Tensor], None] | None = None,
        gate: Callable[[int, Tensor], None] | None = None,
        experts: Callable[[int, Tensor, Tensor], None] | None = None,
        blocks: Collection[int] | None = None,
    ) -> Observation:
        """Register hooks that call the given functions during forward passes, until the observation is closed.

        Args:
            layer: called with (block, hidden) when the block's decoder layer begins. ``hidden`` is the residual stream,
                as ``Gate.predict`` takes it.
            entry: called with (block, hidden) when the MoE part of the layer begins.
            gate: called with (block, probabilities of all experts [tokens, experts]) after the block's gate.
            experts: called with (block, experts [tokens, top_k], weights [tokens, top_k]) before the Experts module
                computes.
            blocks: the blocks to observe; all by default.

        For each block the calls come in this order. For a block that can't be predicted, ``gate`` is not called,
        ``entry`` and ``layer`` may not be, and ``experts`` is.
        """
        observation = Observation()
        with closed_on_error(observation):
            for one in self.blocks if blocks is None else [self.blocks[block] for block in blocks]:
                if layer is not None and one.decoder is not None:
                    observation.add(_before(one.decoder, one.block, layer, 0))
                if entry is not None and one.entry is not None:
                    observation.add(_before(one.entry, one.block, entry, 0))
                if gate is not None and one.gate is not None:
                    observation.add(one.gate.register_forward_hook(_at_gate(gate, one)))
                if experts is not None:
                    observation.add(_before(one.experts, one.block, experts, 1, 2))
        return observation


class Observation(Closeable):
    """Hooks on a model. ``close`` removes them; it can be repeated if an exception has interrupted it."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(self, handle: RemovableHandle) -> None:
        """Add the handle of a hook."""
        self._handles.append(handle)

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()


class Observer:
    """Hook of torch that changes nothing. Code that computes a module's result by other means can call it, too."""

    def __init__(self, call: Callable[..., None], see: Callable[..., tuple[Any, ...]]) -> None:
        """``see`` takes the arguments that torch gives to the hook, and returns those with which ``call`` is called."""
        self._call = call
        self._see = see

    def __call__(self, *given: Any) -> None:  # a value returned here would replace the module's input or output
        self._call(*self._see(*given))


def _before(module: nn.Module, block: int, call: Callable[..., None], *places: int) -> RemovableHandle:
    """Register a hook that calls ``call`` with the block and some of the module's arguments before the module runs.

    ``places`` are the indices of these arguments. Keyword arguments are counted after the positional ones.
    """

    def see(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any] | None = None) -> tuple[Any, ...]:
        given = [*positional, *(named or {}).values()]  # None if the hook was removed while torch was about to call it
        return block, *(given[place] for place in places)

    return module.register_forward_pre_hook(Observer(call, see), with_kwargs=True)


def _at_gate(call: Callable[[int, Tensor], None], gate: Gate) -> Observer:
    return Observer(call, lambda module, given, output: (gate.block, gate.probabilities(output)))


def _gate(model: Any, block: int, path: str, paths: list[str]) -> Gate:
    """Find a block's gate and the modules before it."""
    experts, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    place = re.match(r"(?P<before>(.*\.)?)(?P<layer>\d+)(?P<after>\..*)", path)  # the last number is the layer's
    if place is None:
        return Gate(block, path, None, experts, refusal=f"{path} is in no numbered layer.")
    following = f"{place['before']}{int(place['layer']) + 1}{place['after']}"
    successor = paths.index(following) if following in paths else None
    layer = model.get_submodule(place["before"] + place["layer"])

    mixer = next((name for name in MIXERS if hasattr(layer, name)), None)
    bare = WITHOUT_NORM.get(type(layer).__name__)
    norm = None if bare else next((name for name in NORM_NAMES if hasattr(layer, name)), None)
    entry = mixer or bare or norm
    described = Gate(
        block,
        path,
        successor,
        experts,
        mixer=getattr(layer, mixer) if mixer else None,
        mixed=MIXERS[mixer] if mixer else 0,
        norm=getattr(layer, norm) if norm else None,
        decoder=layer,
        entry=getattr(layer, entry) if entry else None,
        holder=parent,
        dtype=model.dtype,
    )

    gate = next((getattr(parent, name) for name in GATE_NAMES if hasattr(parent, name)), None)
    if gate is None:
        return replace(described, refusal=f"{type(parent).__name__} has no {' and no '.join(GATE_NAMES)}.")
    if entry is None:
        return replace(described, refusal=f"{type(layer).__name__} has no norm of a known name.")
    arguments = tuple(argument_names(gate))
    if unknown := [name for name in arguments if not hasattr(parent, name)]:
        why = f"{type(gate).__name__} wants {' and '.join(unknown)}, which only a forward pass has."
        return replace(described, refusal=why)
    described = replace(described, gate=gate, arguments=arguments)
    return replace(described, scores=_scores(described))


@torch.no_grad()
def _scores(gate: Gate) -> str:
    """Find by a trial which function of SCORES a gate applies to its logits to weigh experts. Return its name.

    A trial is needed because configurations name the function in many ways or not at all. The weights are the
    function's values times a factor, which differs from token to token if weights are normalised over the top-k. The
    result is softmax if no function fits (phimoe weighs each of its two experts by another softmax, over fewer logits)
    or all fit (a single expert with a normalised weight).
    """
    assert gate.gate is not None
    weight = next(gate.gate.parameters())
    random = torch.Generator().manual_seed(0)
    states = torch.randn(TRIED_ROWS, weight.shape[-1], generator=random).to(weight)
    logits, weights, experts = (
        value.float() if value.is_floating_point() else value for value in gate.call(states)[:3]
    )
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(-1), torch.ones(()).to(logits), atol=SAME):
        return "given"
    ratios = {name: weights / function(logits).gather(-1, experts) for name, function in SCORES.items()}
    one_factor = [name for name, ratio in ratios.items() if _is_constant(ratio.flatten())]
    by_token = [name for name, ratio in ratios.items() if _is_constant(ratio)]
    return next(iter([*one_factor, *by_token, "softmax"]))


def _is_constant(rows: Tensor) -> bool:
    """Return whether all numbers along the last dimension are equal up to rounding."""
    return bool(((rows.amax(-1) - rows.amin(-1)) <= SAME * rows.abs().amax(-1)).all())
