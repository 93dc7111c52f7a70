"""Tensors that compiled code can't read, or must not read as others: torch computes with them, or refuses them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from architectures import TINY
from comparison import convert_tiny
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

import moetier
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import causal_attention
from moetier.runtime.kernels.layer.growing_cache import GrowingLayer
from moetier.runtime.kernels.layer.norm import use_quick_norms
from moetier.runtime.kernels.products.row import RowWeight
from moetier.runtime.moe.experts import experts_modules

BF16 = torch.bfloat16
IDS = (5, 17, 200)


class Wrapped(Tensor):
    """A tensor without memory: another one computes what is done with it. FakeTensor and DTensor are such."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        given = tree_map_only(Wrapped, lambda each: each.inner, (arguments, named or {}))
        return tree_map_only(Tensor, Wrapped, function(*given[0], **given[1]))


class Tagged(Tensor):
    """A subclass that torch keeps in results."""


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    sizes = {name: 64 for name in TINY if name.endswith("intermediate_size")}
    with patch.dict(TINY, sizes | {"num_attention_heads": 2, "num_hidden_layers": 2}):
        _, directory = convert_tiny("qwen3_moe", BF16, tmp_path, bits=4, head_dim=32)
    found, _ = moetier.load(directory, daemon=None, device="cpu", speculate="off")
    with found.tiers:
        yield found


@torch.no_grad()
def decode(model: Any, cache: Any = None, ids: tuple[int, ...] = IDS) -> Tensor:
    """Logits [tokens, vocabulary] of tokens that are given one by one."""
    cache = DynamicCache() if cache is None else cache
    return torch.cat([model(torch.tensor([[token]]), **{CACHE: cache}).logits[0].float() for token in ids])


def decode_without(model: Any, *given: Any) -> Tensor:
    """Decode with each layer's own code: a layer with a hook on its attention is computed so."""
    handles = [layer.self_attn.register_forward_hook(lambda *_: None) for layer in model.model.layers]
    try:
        return decode(model, *given)
    finally:
        for handle in handles:
            handle.remove()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


@torch.no_grad()
def test_tensors_without_memory_are_torchs(model: Any) -> None:
    decode(model)
    layer = model.model.layers[0]
    x = numbers(1, 64)
    chosen = {"top_k_index": torch.tensor([[2, 0, 1]]), "top_k_weights": torch.ones(1, 3, dtype=BF16)}
    for module in (layer.input_layernorm, layer.self_attn.q_proj, partial(layer.mlp.experts, **chosen)):
        found, wanted = module(Wrapped(x)), module(x)
        assert type(found) is Wrapped
        assert torch.allclose(found.inner, wanted, rtol=0.1, atol=0.1)
    query, key = numbers(1, 2, 1, 32), numbers(1, 2, 5, 32)
    found, _ = causal_attention(nn.Module(), Wrapped(query), Wrapped(key), Wrapped(key), None)
    wanted, _ = causal_attention(nn.Module(), query, key, key, None)
    assert torch.allclose(found.inner, wanted, rtol=0.02, atol=0.02)  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_cache_of_tensors_without_memory_has_no_room() -> None:
    layer = GrowingLayer()
    layer.update(Wrapped(numbers(1, 2, 3, 32)), Wrapped(numbers(1, 2, 3, 32)))
    assert layer.memory() is None
    layer.update(Wrapped(numbers(1, 2, 1, 32)), Wrapped(numbers(1, 2, 1, 32)))
    assert layer.get_seq_length() == 4


def test_the_default_device_is_not_used(model: Any) -> None:
    """A user's default may be a GPU, while the model is on the CPU. The first token tries the layers."""
    with torch.device("meta"):
        cache = DynamicCache()
        with torch.no_grad():
            found = [model(torch.tensor([[token]], device="cpu"), **{CACHE: cache}).logits[0].float() for token in IDS]
            prompt = model(torch.tensor([IDS], device="cpu")).logits[0].float()
    assert torch.equal(torch.cat(found), decode(model))
    with torch.no_grad():
        assert torch.equal(prompt, model(torch.tensor([IDS])).logits[0].float())


@pytest.mark.parametrize("lay", [lambda weight: weight.T, lambda weight: weight[:4]], ids=["turned", "cut"])
def test_a_weight_that_lies_otherwise_at_the_same_address_counts(model: Any, lay: Callable[[Tensor], Tensor]) -> None:
    """Such as that of a router for fewer experts."""
    before = decode(model)
    layer = model.model.layers[1]
    weight = layer.self_attn.o_proj.weight if len(lay(numbers(8, 64))) > 4 else layer.mlp.gate.weight
    weight.data = lay(weight.data)
    assert not torch.equal(before, wanted := decode_without(model))
    assert torch.equal(decode(model), wanted)


def test_angles_of_another_shape_are_the_layers(model: Any) -> None:
    cache = DynamicCache()
    decode(model, cache)
    model.model.rotary_emb.register_forward_hook(lambda _, given, output: tuple(each.mT for each in output))
    for way in (decode, decode_without):
        with pytest.raises(RuntimeError, match=r"size|shape"):
            way(model, copy.deepcopy(cache))


def test_an_update_of_the_caches_own_is_called(model: Any) -> None:
    cache, calls = DynamicCache(), []
    decode(model, cache)
    update = cache.update

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given[2])
        return update(*given, **named)

    cache.update = counted  # type: ignore[method-assign]
    decode(model, cache, (9,))
    assert calls == [0, 1]


@pytest.mark.parametrize("other", [lambda x: x.float(), lambda x: x.to("meta"), lambda x: x.repeat(2, 1, 1, 1)])
@torch.no_grad()
def test_tokens_of_another_type_join_a_cache_as_in_transformers(other: Callable[[Tensor], Tensor]) -> None:
    def same(x: Tensor) -> Tensor:
        return x

    for first, then in ((same, other), (other, same)):
        layers, outcomes = (GrowingLayer(), DynamicLayer()), []
        for layer in layers:
            layer.update(*[first(numbers(1, 2, 3, 32))] * 2)
            try:
                outcomes.append(layer.update(*[then(numbers(1, 2, 1, 32))] * 2))
            except RuntimeError:
                outcomes.append(None)
        found, wanted = outcomes
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert found[0].dtype == wanted[0].dtype
            assert all(map(torch.equal, found, wanted))
        assert layers[0].get_seq_length() == layers[1].get_seq_length()


@torch.no_grad()
def test_a_mask_of_integers_is_refused() -> None:
    """They would be added to the scores."""
    query, key = numbers(1, 2, 1, 32), numbers(1, 2, 5, 32)
    with pytest.raises(RuntimeError, match="mask"):
        causal_attention(nn.Module(), query, key, key, torch.ones(1, 1, 1, 5, dtype=torch.int64))


@torch.no_grad()
def test_keys_of_another_device_are_refused() -> None:
    query, key = numbers(1, 2, 1, 32), numbers(1, 2, 5, 32)
    for keys in ((key.to("meta"), key), (key, key.to("meta"))):
        with pytest.raises((RuntimeError, NotImplementedError)):
            causal_attention(nn.Module(), query, *keys, None)


@torch.no_grad()
def test_experts_and_weights_that_cannot_be_used_are_refused(model: Any) -> None:
    module = next(iter(experts_modules(model).values()))
    x, experts, weights = numbers(1, 64), torch.tensor([[2, 0, 1]]), torch.ones(1, 3)
    wanted = module(x, experts, weights)
    assert torch.equal(module(x, experts.int(), weights), wanted)
    assert torch.equal(module(x, experts, torch.ones(1, 6)[:, ::2]), wanted)
    with pytest.raises((IndexError, RuntimeError)):
        module(x, -experts, weights)
    with pytest.raises(RuntimeError):
        module(x, experts, weights.to("meta"))


@torch.no_grad()
def test_arguments_may_be_named() -> None:
    norm = nn.ModuleList([Qwen3MoeRMSNorm(64).to(BF16)])
    use_quick_norms(norm)
    x = numbers(1, 64)
    assert torch.allclose(norm[0](hidden_states=x), norm[0](x), rtol=0.01)


@torch.no_grad()
def test_a_product_is_of_the_type_that_torch_gives_it() -> None:
    weight, x = RowWeight(numbers(32, 64), False), numbers(1, 64)
    plain = nn.Parameter(weight.data.clone(), False)
    for given in (x, x.as_subclass(Tagged), numbers(2, 64).as_subclass(Tagged)):
        found = F.linear(given, weight)
        assert type(found) is type(F.linear(given, plain))
        assert torch.allclose(found, F.linear(given, plain), rtol=0.02, atol=0.05)
    with pytest.raises(RuntimeError):
        F.linear(x, plain, numbers(32).float())
    with pytest.raises(RuntimeError):
        F.linear(x, weight, numbers(32).float())


@torch.no_grad()
def test_a_router_with_a_weight_that_is_computed_is_its_own(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    before = decode(model)
    nn.utils.parametrize.register_parametrization(gate, "weight", nn.Identity())
    assert torch.allclose(decode(model), before, rtol=0.05, atol=0.1)
