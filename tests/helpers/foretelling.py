"""Every gate of a tiny model asked on its own layer's entry, against what it does when its turn comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from architectures import tiny_model
from torch import Tensor

from moetier.runtime.moe.gates import ExpertChoice, Gates


@dataclass(frozen=True, slots=True)
class Foretelling:
    """By block. ``refused`` were not asked; of ``wrong`` experts or probabilities differ in a bit; ``idle`` never ran;
    ``misplaced`` send another number of tokens where their layer begins than at their own turn.

    ``unchanged``: the model's outputs and its state are bitwise those of one that nobody asks.
    """

    blocks: int
    scores: tuple[str, ...]
    refusals: str | None
    refused: frozenset[int]
    wrong: frozenset[int]
    idle: frozenset[int]
    misplaced: frozenset[int]
    unchanged: bool


@torch.no_grad()
def foretell(model_type: str, dtype: torch.dtype, **changes: Any) -> Foretelling:
    """``changes`` go into the configuration."""
    model = tiny_model(model_type, dtype, **changes)
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    plain = run(model_type, model)
    gates = Gates(model)
    said: dict[int, ExpertChoice] = {}
    early: dict[int, ExpertChoice] = {}
    ran, wrong, misplaced = set(), set(), set()

    def layer(block: int, hidden: Tensor) -> None:
        if gates.blocks[block].refusal is None:
            early[block] = gates.blocks[block].predict(hidden)

    def entry(block: int, hidden: Tensor) -> None:
        if gates.blocks[block].refusal is None:
            kept = hidden.clone()
            said[block] = gates.blocks[block].predict(hidden)
            if not torch.equal(kept, hidden):
                wrong.add(block)

    def gate(block: int, probabilities: Tensor) -> None:
        told = said[block]
        if len(probabilities) and not torch.equal(told.probabilities, probabilities.gather(-1, told.experts)):
            wrong.add(block)

    def experts(block: int, indices: Tensor, weights: Tensor) -> None:
        if not len(indices):
            return  # ernie4_5_vl_moe: all tokens are of the other kind
        ran.add(block)
        if gates.blocks[block].refusal is None and not torch.equal(said[block].experts, indices):
            wrong.add(block)
        if gates.blocks[block].refusal is None and early[block].experts.shape != indices.shape:
            misplaced.add(block)

    with gates.observe(layer=layer, entry=entry, gate=gate, experts=experts):
        asked = run(model_type, model)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    same_state = all(torch.equal(value, after[name]) for name, value in before.items())
    return Foretelling(
        len(gates.blocks),
        tuple(sorted({one.scores for one in gates.blocks if one.refusal is None})),
        gates.refusals(),
        frozenset(one.block for one in gates.blocks if one.refusal is not None),
        frozenset(wrong),
        frozenset(range(len(gates.blocks))) - ran,
        frozenset(misplaced),
        same_state and all(map(torch.equal, plain, asked)),
    )


def run(model_type: str, model: Any) -> list[Tensor]:
    """Forward passes that reach every Experts module: of text, and of what else the architecture has experts for."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 250, (2, 17), generator=random)
    torch.manual_seed(0)  # diffusion_gemma fills its canvas at random
    outputs = [getattr(model, "thinker", model)(input_ids=ids).logits]
    if model_type == "ernie4_5_vl_moe":  # other experts for images: here all tokens are of one
        outputs.append(model(input_ids=ids, moe_mm_token_type_ids=torch.ones_like(ids)).logits)
    if model_type == "qwen3_omni_moe":
        width = model.talker.model.config.hidden_size
        states = torch.randn(2, 9, width, generator=random).to(model.dtype)
        outputs.append(model.talker.model(inputs_embeds=states).last_hidden_state)
    if model_type == "dots3_note":
        outputs.append(_image(model, random))
    return outputs


def _image(model: Any, random: torch.Generator) -> Tensor:
    """The vision tower on patches of one image."""
    tower = model.model.vision_tower
    grid = torch.tensor([[1, 4, 4]])
    config = tower.config
    size = config.num_channels * config.patch_size**2
    patches = torch.randn(16, size, generator=random).to(model.dtype)
    features = tower(patches, grid)
    states: Tensor = features if isinstance(features, Tensor) else features[0]
    return states
