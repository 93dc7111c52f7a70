"""The figures of the model's card: ``measure.py MODEL TOKENS.npz``.

Held-out loss by kind of text; how even the routing is; which share of experts an LRU cache per layer would have had
(one cold cache a sequence, both experts looked up before either is touched); and how well the gates of later layers,
applied to the present hidden state, foretell their choices.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from train import EXPERTS, SEQUENCE, TOP_K, held_out_loss
from transformers import MixtralForCausalLM

LRU_SIZES = (1, 2, 3, 4, 5, 6, 7, 8)
ROWS = 4  # sequences of SEQUENCE tokens, of each kind


class Routing:
    """Records each layer's choices [tokens, top_k], and what its gate says of earlier layers' hidden states."""

    def __init__(self, model: MixtralForCausalLM) -> None:
        self.layers = model.model.layers
        self.chosen: list[torch.Tensor] = [torch.empty(0)] * len(self.layers)
        self.foretold: dict[tuple[int, int], torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            layer.post_attention_layernorm.register_forward_pre_hook(self._before_norm(index))
            layer.mlp.gate.register_forward_hook(self._after_gate(index))

    def _before_norm(self, index: int):
        def hook(_module: object, arguments: tuple[torch.Tensor]) -> None:
            for ahead in (1, 2):
                if index + ahead < len(self.layers):
                    later = self.layers[index + ahead]
                    hidden = later.post_attention_layernorm.forward(arguments[0])
                    self.foretold[index, ahead] = later.mlp.gate.forward(hidden.flatten(0, -2))[2]

        return hook

    def _after_gate(self, index: int):
        def hook(_module: object, _arguments: object, output: tuple[torch.Tensor, ...]) -> None:
            self.chosen[index] = output[2]

        return hook

    def recall(self, ahead: int) -> float:
        hits = [
            (foretold.unsqueeze(-1) == self.chosen[index + ahead].unsqueeze(-2)).any(-2).float().mean().item()
            for (index, distance), foretold in self.foretold.items()
            if distance == ahead
        ]
        return float(np.mean(hits))


def lru_hits(chosen: np.ndarray, size: int) -> tuple[int, int]:
    """(hits, look-ups) of one layer's choices [tokens, top_k] in a cold cache of ``size`` experts."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for experts in chosen:
        hits += sum(int(expert) in cache for expert in experts)
        for expert in sorted(map(int, experts), reverse=True):
            cache[expert] = None
            cache.move_to_end(expert)
            if len(cache) > size:
                cache.popitem(last=False)
    return hits, chosen.size


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tokens = dict(np.load(arguments.tokens))
    model = MixtralForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    losses = held_out_loss(model, tokens)
    print(f"held-out loss {losses}, mean {np.mean(list(losses.values())):.3f}")

    model.eval()
    routing = Routing(model)
    totals = {size: np.zeros(2) for size in LRU_SIZES}
    for name in sorted(tokens):
        if not name.startswith("eval_"):
            continue
        hits = {size: np.zeros(2) for size in LRU_SIZES}
        use = np.zeros((len(routing.layers), EXPERTS))
        recalls = []
        for row in tokens[name][: ROWS * SEQUENCE].astype(np.int64).reshape(-1, SEQUENCE):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(input_ids=torch.from_numpy(row)[None])
            recalls.append([routing.recall(ahead) for ahead in (1, 2)])
            for index, chosen in enumerate(routing.chosen):
                use[index] += np.bincount(chosen.flatten().numpy(), minlength=EXPERTS)
                for size in LRU_SIZES:
                    hits[size] += lru_hits(chosen.numpy(), size)
        for size in LRU_SIZES:
            totals[size] += hits[size]
        curve = " ".join(f"{h / n:.3f}" for h, n in hits.values())
        favourites = " ".join(f"{share:.2f}" for share in use.max(1) / (use.sum(1) / TOP_K))
        one, two = np.mean(recalls, 0)
        print(f"{name[5:]:9} LRU {curve} | favourite by layer {favourites} | recall {one:.3f} {two:.3f}")
    print("all       LRU", " ".join(f"{h / n:.3f}" for h, n in totals.values()))


if __name__ == "__main__":
    main()
