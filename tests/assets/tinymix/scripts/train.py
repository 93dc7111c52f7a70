"""Train tinymix, a small Mixtral, on a corpus of tokens: ``train.py TOKENS.npz OUT [--start MODEL] [--steps N]``.

``TOKENS.npz`` is what ``prepare_corpus.py`` writes: ``train`` (uint16) and one ``eval_*`` array for each kind of text.
Every layer's router is balanced by itself (Switch Transformer, arXiv 2101.03961, equation 4), from the first step on:
transformers' own balancing loss is taken over all layers at once, and leaves single layers with a favourite expert.

The schedule counts steps, not seconds, so a busy machine changes the time that training takes and not its result.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

SEQUENCE = 512  # tokens
BATCH = 8  # sequences a step
EXPERTS = 8
TOP_K = 2
WARM_UP = 100  # steps

CONFIG = MixtralConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_local_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    max_position_embeddings=2048,
    output_router_logits=True,
    router_aux_loss_coef=0.0,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=3,
    rope_theta=10000.0,
)


def imbalance(logits: torch.Tensor) -> torch.Tensor:
    """Of one layer's router logits [tokens, experts]: 1 when its choices are even, experts / top_k at worst."""
    probabilities = logits.float().softmax(-1)
    chosen = functional.one_hot(probabilities.topk(TOP_K, -1).indices, EXPERTS).float().mean((0, 1))
    return EXPERTS * (chosen * probabilities.mean(0)).sum()


@torch.no_grad()
def held_out_loss(model: MixtralForCausalLM, tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats a token on the first eight sequences of every ``eval_*`` array."""
    model.eval()
    losses = {}
    for name in sorted(tokens):
        if not name.startswith("eval_"):
            continue
        rows = tokens[name][: SEQUENCE * min(8, len(tokens[name]) // SEQUENCE)]
        batch = torch.from_numpy(rows.astype(np.int64).reshape(-1, SEQUENCE))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, output_router_logits=False).logits.float()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        losses[name.removeprefix("eval_")] = round(loss.item(), 3)
    model.train()
    return losses


def save(model: MixtralForCausalLM, folder: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config.output_router_logits = False
    half = MixtralForCausalLM(config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder, max_shard_size="20MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="a model to go on from, with a fresh optimiser")
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its peak")
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the balancing loss")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    tokens = dict(np.load(arguments.tokens))
    train = tokens["train"]
    sequences = (len(train) - 1) // SEQUENCE
    order = np.random.default_rng(0).permutation(sequences)

    model = MixtralForCausalLM(CONFIG)
    if arguments.start:
        model.load_state_dict(MixtralForCausalLM.from_pretrained(arguments.start, dtype=torch.float32).state_dict())
    model.set_experts_implementation("grouped_mm")
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)

    start = time.perf_counter()
    mean = float("nan")
    for step in range(arguments.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1, (step + 1) / WARM_UP) * (0.03 + 0.97 * cosine)
        rows = [order[(step * BATCH + i) % sequences] for i in range(BATCH)]
        batch = torch.from_numpy(np.stack([train[r * SEQUENCE : (r + 1) * SEQUENCE] for r in rows]).astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input_ids=batch, labels=batch)
        balance = torch.stack([imbalance(logits) for logits in output.router_logits]).mean()
        (output.loss + arguments.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = output.loss.item() if step == 0 else 0.98 * mean + 0.02 * output.loss.item()
        if (step + 1) % 25 == 0:
            seconds = time.perf_counter() - start
            print(f"{seconds:.0f} s, step {step + 1}, loss {mean:.3f}, balance {balance.item():.3f}", flush=True)
        if (step + 1) % 400 == 0 or step + 1 == arguments.steps:
            print(f"step {step + 1}, held out {held_out_loss(model, tokens)}", flush=True)
            save(model, arguments.out)


if __name__ == "__main__":
    main()
