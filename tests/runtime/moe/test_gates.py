from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import FURTHER, REQUIRED, TYPES, VARIED, model_class, tiny_config, tiny_model
from foretelling import foretell, run
from torch import Tensor, nn

from moetier.runtime.moe.gates import Gates

FP32, BF16 = torch.float32, torch.bfloat16

# type -> its blocks that can't be asked ahead, and why; every other block of every type can
REFUSED = {
    "deepseek_v4": (
        {0},
        "1 of 3 blocks can't be predicted: DeepseekV4HashRouter wants input_ids, which only a forward pass has.",
    ),
    "zaya": (
        {0, 1, 2},
        "3 of 3 blocks can't be predicted: ZayaRouter wants router_states, which only a forward pass has.",
    ),
}
# the function of the logits by which experts are weighed; softmax in all other types
SCORES = {
    "sigmoid": {
        "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note",
        "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hy_v3", "hy_v4",
        "hy_v4_vl", "inkling", "inkling2", "inkling2_loop", "kimi_linear", "kolibri1", "laguna", "lfm2_moe",
        "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "muse_spark", "nemotron_h", "solar_open",
    },
    "sqrtsoftplus": {"deepseek_v4"},
    "given": {"diffusion_gemma", "gemma4"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        pytest.param(each, dtype, marks=[pytest.mark.slow] * (each not in VARIED and (dtype == FP32 or number % 2)))
        for number, each in enumerate(sorted(REQUIRED | FURTHER))
        for dtype in (FP32, BF16)
    ],
)
def test_a_gate_foretells_its_own_turn(model_type: str, dtype: torch.dtype) -> None:
    """Experts in the gate's order and probabilities, bit for bit; and the model computes as if nobody had asked."""
    found = foretell(model_type, dtype)
    refused, why = REFUSED.get(model_type, (set(), None))
    assert found.blocks >= 2
    assert (found.refused, found.refusals) == (refused, why)
    assert (found.wrong, found.idle, found.misplaced) == (frozenset(), frozenset(), frozenset())
    assert found.unchanged
    if len(refused) < found.blocks:
        assert found.scores == (next((name for name, types in SCORES.items() if model_type in types), "softmax"),)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("deepseek_v3", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_whether_weights_are_normalised_is_no_matter(model_type: str, changes: dict[str, Any]) -> None:
    found = foretell(model_type, BF16, **changes)
    assert found.wrong == frozenset()
    assert found.scores == ("sigmoid" if model_type in SCORES["sigmoid"] else "softmax",)


def test_a_layer_that_is_passed_three_times_is_foretold_each_time() -> None:
    text = tiny_config(model_class("inkling2_loop").config_class).text_config.to_dict()
    text |= {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2}
    found = foretell("inkling2_loop", FP32, text_config=text)
    assert (found.blocks, found.wrong, found.unchanged) == (3, frozenset(), True)


@pytest.mark.parametrize("model_type", TYPES)
def test_asking_waits_for_no_device(model_type: str) -> None:
    """Tensors without data raise wherever the host would have to know a number in them."""
    model = tiny_model(model_type, BF16)
    gates, entries = Gates(model), dict[int, Tensor]()
    with torch.no_grad(), gates.observe(entry=entries.__setitem__):
        run(model_type, model)
    model.to("meta")
    for gate in gates.blocks:
        if gate.refusal is None:
            experts, probabilities = gate.predict(entries[gate.block].to("meta"))
            assert experts.shape == probabilities.shape
            assert experts.device.type == probabilities.device.type == "meta"


def chain(model: nn.Module) -> list[tuple[str, int | None]]:
    """Of each block: its path behind "layers.", and its successor."""
    return [(gate.path.rpartition("layers.")[2], gate.successor) for gate in Gates(model).blocks]


@pytest.mark.parametrize(
    ("model_type", "blocks"),
    [
        ("mixtral", [("0.mlp.experts", 1), ("1.mlp.experts", 2), ("2.mlp.experts", None)]),
        ("deepseek_v3", [("1.mlp.experts", 1), ("2.mlp.experts", None)]),  # its first layer is dense
        (
            "ernie4_5_vl_moe",  # experts for text and for images in each layer
            [
                ("1.mlp.text_moe.experts", 2),
                ("1.mlp.vision_moe.experts", 3),
                ("2.mlp.text_moe.experts", None),
                ("2.mlp.vision_moe.experts", None),
            ],
        ),
        ("nemotron_h", [("1.mixer.experts", None), ("3.mixer.experts", None)]),  # no neighbours
    ],
)
def test_the_successor_is_at_the_same_path_in_the_next_layer(
    model_type: str, blocks: list[tuple[str, int | None]]
) -> None:
    assert chain(tiny_model(model_type, BF16)) == blocks


def test_towers_and_talkers_are_no_successors_of_text() -> None:
    """qwen3_omni_moe: two stacks of layers."""
    gates = Gates(tiny_model("qwen3_omni_moe", BF16))
    paths = [gate.path for gate in gates.blocks]
    for gate in gates.blocks:
        if gate.successor is not None:
            before, after = gate.path, paths[gate.successor]
            assert before.split(".")[0] == after.split(".")[0]
    assert [gate.successor for gate in gates.blocks].count(None) == 2


def test_a_part_of_a_model_has_gates_too() -> None:
    """Its paths begin with "layers."."""
    model = tiny_model("mixtral", BF16)
    assert chain(model.model) == chain(model)


def test_how_far_ahead_there_is_a_gate_to_ask() -> None:
    gates = Gates(tiny_model("mixtral", BF16))
    assert [gates.ahead(0, distance) for distance in range(4)] == [0, 1, 2, None]
    assert [gates.ahead(block, 1) for block in range(3)] == [1, 2, None]
    layers = {"mlp_layer_types": ["moe", "hash_moe", "moe"]}
    gates = Gates(tiny_model("deepseek_v4", BF16, **layers))
    assert [gates.ahead(0, distance) for distance in range(4)] == [0, None, 2, None], (
        "one that can't be asked is passed"
    )


def test_an_earlier_place_of_the_stream_gives_another_prediction() -> None:
    """So the equality above is no accident of gates that say the same to everything."""
    model = tiny_model("mixtral", FP32)
    gates, guesses, real = Gates(model), dict[int, Tensor](), dict[int, Tensor]()

    def entry(block: int, hidden: Tensor) -> None:
        if (ahead := gates.ahead(block, 1)) is not None:
            guesses[ahead] = gates.blocks[ahead].predict(hidden).experts

    with torch.no_grad(), gates.observe(entry=entry, experts=lambda block, experts, _: real.update({block: experts})):
        model(input_ids=torch.arange(2, 66)[None])
    assert guesses.keys() == {1, 2}
    assert all(not torch.equal(guesses[block], real[block]) for block in guesses)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_an_observation_ends_when_it_is_removed() -> None:
    model = tiny_model("mixtral", BF16)
    before, calls = hooks(model), list[str]()
    gates = Gates(model)
    ids = torch.arange(2, 11)[None]
    observation = gates.observe(
        entry=lambda block, hidden: calls.append(f"entry {block} {list(hidden.shape)}"),
        gate=lambda block, probabilities: calls.append(f"gate {block} {list(probabilities.shape)}"),
        experts=lambda block, experts, weights: calls.append(f"experts {block} {list(experts.shape)}"),
    )
    with torch.no_grad():
        model(input_ids=ids)
        assert calls == [
            call for b in range(3) for call in (f"entry {b} [1, 9, 64]", f"gate {b} [9, 8]", f"experts {b} [9, 3]")
        ]
        observation.close()
        observation.close()
        model(input_ids=ids)
    assert len(calls) == 9
    assert hooks(model) == before


def test_an_observation_ends_with_an_error_too() -> None:
    model = tiny_model("mixtral", BF16)
    before = hooks(model)

    def fails(block: int, hidden: Tensor) -> None:
        raise RuntimeError("of the observer")

    with pytest.raises(RuntimeError, match="of the observer"), Gates(model).observe(entry=fails):
        model(input_ids=torch.arange(2, 11)[None])
    assert hooks(model) == before


def test_what_an_observer_returns_replaces_no_output() -> None:
    model = tiny_model("mixtral", BF16)
    ids = torch.arange(2, 11)[None]
    plain = model(input_ids=ids).logits

    def meddles(*given: Any) -> Any:
        return [torch.zeros(1)] * 3

    with Gates(model).observe(entry=meddles, gate=meddles, experts=meddles):
        assert torch.equal(model(input_ids=ids).logits, plain)


class Lonely(nn.Module):
    """A layer whose Experts module has neither gate nor number."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.dtype = BF16


def test_what_is_not_found_is_reported() -> None:
    model = tiny_model("mixtral", BF16)
    del model.model.layers[1].mlp.gate
    del model.model.layers[2].post_attention_layernorm, model.model.layers[2].input_layernorm
    gates = Gates(model)
    assert [gate.refusal for gate in gates.blocks] == [
        None,
        "MixtralSparseMoeBlock has no gate and no router.",
        "MixtralDecoderLayer has no norm of a known name.",
    ]
    refusals = gates.refusals()
    assert refusals is not None
    assert refusals.startswith("2 of 3 blocks can't be predicted: MixtralSparseMoeBlock has no gate")
    lonely = Gates(Lonely(model.model.layers[0].mlp.experts)).blocks
    assert [gate.refusal for gate in lonely] == ["experts is in no numbered layer."]
