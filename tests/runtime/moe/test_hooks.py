"""Hooks on every module may return and keep any tensors: compiled code computes what the layers' own code computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from architectures import TINY
from comparison import convert_tiny
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import moetier
from moetier.runtime.generation.compat import CACHE

BF16, FP32 = torch.bfloat16, torch.float32
IDS = (9, 40, 77)
# each token uses all experts, so that rounding can't choose others
COUNTS = ["num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"]
SIZES = dict.fromkeys(COUNTS, 4) | {name: 64 for name in TINY if name.endswith("intermediate_size")}
# type, bits of the trunk, width of heads: a shared expert beside the experts, one with a gate, neither, sinks and
# biases, latent attention
MODELS: dict[str, tuple[torch.dtype, Any, dict[str, int]]] = {
    "glm4_moe": (BF16, 4, {"head_dim": 64}),
    "qwen2_moe": (BF16, 16, {"head_dim": 32}),
    "mixtral": (FP32, 4, {"head_dim": 32}),
    "gpt_oss": (BF16, 4, {"head_dim": 32}),
    "deepseek_v3": (BF16, 4, {}),
}


class Tagged(Tensor):
    """A subclass without operations of its own."""


def with_gaps(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape, 2))[..., 0].copy_(x)


def at_an_odd_address(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "kept": lambda x: x,
    "of another type": lambda x: x.to(FP32 if x.dtype == BF16 else BF16),
    "with gaps": with_gaps,
    "at an odd address": at_an_odd_address,
    "changed in place": lambda x: x.neg_(),
    "of another shape": lambda x: x[0] if len(x) == 1 and x.dim() > 1 else x[None],
    "too narrow": lambda x: x[..., :1],
    "of a subclass": lambda x: x.as_subclass(Tagged),
}
SITES = ("output", "input")


def load(model_type: str, folder: Path, *, dtype: torch.dtype, trunk_bits: Any, **changes: Any) -> list[Any]:
    """A model, and the same as transformers computes it."""
    with patch.dict(TINY, SIZES | {"num_hidden_layers": 2}):
        _, directory = convert_tiny(model_type, dtype, folder, bits=4, trunk_bits=trunk_bits, **changes)
    options: Any = {"daemon": None, "device": "cpu", "speculate": "off"}
    return [moetier.load(directory, exact=exact, **options)[0] for exact in (False, True)]


class Models:
    """The models of one type, each with a cache of a prompt."""

    def __init__(self, model_type: str, folder: Path) -> None:
        dtype, trunk_bits, changes = MODELS[model_type]
        self.all = load(model_type, folder, dtype=dtype, trunk_bits=trunk_bits, **changes)
        with torch.no_grad():
            prompt = torch.tensor([[5, 6, 7]])
            self.caches = [model(prompt, use_cache=True).past_key_values for model in self.all]

    def decode(self, which: int, hooked: str, hook: Hook) -> tuple[Tensor, list[Tensor]] | type[Exception]:
        """Logits [tokens, vocabulary] of IDS, and what the hook has kept; or the class of the error."""
        model, cache = self.all[which], copy.deepcopy(self.caches[which])
        kept: list[Any] = []
        handle = hook(model.get_submodule(hooked), kept)
        try:
            with torch.no_grad():
                found = [model(torch.tensor([[token]]), **{CACHE: cache}).logits.flatten().float() for token in IDS]
        except Exception as error:
            return type(error)
        finally:
            handle.remove()
        return torch.stack(found).as_subclass(Tensor), [*tensors(kept)]

    def decode_without(self, hooked: str, hook: Hook) -> tuple[Tensor, list[Tensor]] | type[Exception]:
        """Decode without compiled layers: a layer with a hook on its attention computes with its own code."""
        with ExitStack() as stack:
            for layer in self.all[0].model.layers:
                stack.callback(layer.self_attn.register_forward_hook(lambda *_: None).remove)
            return self.decode(0, hooked, hook)


Hook = Callable[[Any, list[Any]], Any]  # registers a hook on a module that keeps what it sees in a list


def hook_of(site: str, change: Callable[[Tensor], Tensor]) -> Hook:
    """A hook that changes the tensors that a module gets or returns."""

    def after(kept: list[Any], _: Any, given: Any, output: Any) -> Any:
        kept.append((given, changed := changed_by(change, output)))
        return changed

    def before(kept: list[Any], _: Any, given: Any, named: dict[str, Any]) -> Any:
        if given:
            given = changed_by(change, given)
        elif "hidden_states" in named:
            named = named | {"hidden_states": changed_by(change, named["hidden_states"])}
        kept.append((given, named.get("hidden_states")))
        return given, named

    def register(module: Any, kept: list[Any]) -> Any:
        if site == "output":
            return module.register_forward_hook(lambda *seen: after(kept, *seen))
        return module.register_forward_pre_hook(lambda *seen: before(kept, *seen), with_kwargs=True)

    return register


def changed_by(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(changed_by(change, each) for each in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.as_subclass(Tensor)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, marks=[pytest.mark.slow] * (each != "gpt_oss")) for each in MODELS],
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    found = Models(request.param, tmp_path_factory.mktemp(request.param))
    with found.all[0].tiers, found.all[1].tiers:
        yield found


def compare(models: Models, hooked: str, site: str, change: str) -> None:
    hook = hook_of(site, CHANGES[change])
    found, wanted, exact = models.decode(0, hooked, hook), models.decode_without(hooked, hook), None
    if isinstance(found, type) or isinstance(wanted, type):
        assert found is wanted
        return
    assert torch.equal(found[0], wanted[0])
    assert len(found[1]) == len(wanted[1])
    assert all(one.dtype == two.dtype and torch.equal(one, two) for one, two in zip(found[1], wanted[1], strict=True))
    exact = models.decode(1, hooked, hook)
    # where a norm takes one number, or experts' outputs are one number, rounding decides
    if not isinstance(exact, type) and change != "too narrow":
        assert float((found[0] - exact[0]).abs().max()) < 0.12 * float(exact[0].abs().max())


def paths(models: Models) -> list[str]:
    """All modules of the last layer, and those around the layers."""
    return [path for path, _ in models.all[0].named_modules() if path and ".layers.0" not in path]


def test_each_module_may_have_a_hook_that_changes_tensors(models: Models) -> None:
    """Each with one change of its input or its output; and a module that a compiled layer calls, with all of them."""
    for number, path in enumerate(paths(models)):
        cases = [(SITES[number % 2], [*CHANGES][number // 2 % len(CHANGES)])]
        if path.endswith("mlp.shared_experts"):
            cases = [*itertools.product(SITES, CHANGES)]
        if path.endswith("experts.act_fn"):  # compiled code has a function in its place
            cases = [("output", "changed in place")]
        for case in cases:
            compare(models, path, *case)


@pytest.mark.slow
def test_each_module_may_have_a_hook_with_each_change(models: Models) -> None:
    for case in itertools.product(paths(models), SITES, CHANGES):
        compare(models, *case)


@pytest.mark.parametrize("is_global", [False, True], ids=["on each module", "on all"])
def test_a_hook_is_called_once_for_each_call_and_never_in_a_trial(is_global: bool, tmp_path: Path) -> None:
    """The first token of a model tries its layers, routers and activations."""
    dtype, trunk_bits, changes = MODELS["glm4_moe"]
    model, ordinary = load("glm4_moe", tmp_path, dtype=dtype, trunk_bits=trunk_bits, **changes)
    with model.tiers, ordinary.tiers:
        calls: list[list[str]] = []
        for each in (model, ordinary):
            names = {id(module): path for path, module in each.named_modules()}
            seen: list[str] = []
            calls.append(seen)

            def note(module: Any, *_: Any, names: dict[int, str] = names, seen: list[str] = seen) -> None:
                seen.append(names.get(id(module), "a trial's"))

            with ExitStack() as stack:
                for module in [None] if is_global else [*each.modules()]:
                    register = register_module_forward_hook if module is None else module.register_forward_hook
                    stack.callback(register(note).remove)
                with torch.no_grad():
                    each(torch.tensor([[5]]), use_cache=True)
        # an expert that no token uses has no activation; here each is computed alone, as in transformers
        assert calls[0] == calls[1]
        assert any(path.endswith("act_fn") for path in calls[0])


class Keeps(torch.nn.Module):
    """A shared expert of a user's own, which keeps what it gets."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        y: Tensor = self.inner(x)
        return y


def test_a_module_that_a_compiled_layer_calls_may_keep_its_input(tmp_path: Path) -> None:
    models = Models("glm4_moe", tmp_path)
    with models.all[0].tiers, models.all[1].tiers:
        block = models.all[0].model.layers[1].mlp
        block.shared_experts = Keeps(block.shared_experts)
        hook = hook_of("output", CHANGES["kept"])
        for decode in (partial(models.decode, 0), models.decode_without):
            assert isinstance(decode("model.norm", hook), tuple)
        kept = block.shared_experts.kept
        assert all(map(torch.equal, kept[-2 * len(IDS) : -len(IDS)], kept[-len(IDS) :]))  # those before are a trial's
