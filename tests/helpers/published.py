"""Sizes of some published models, and what `moetier plan` says of them with a given memory.

``python tests/helpers/published.py`` prints the rows of the table of "Which way for me" in README.md, and what
"Programs for coding" in docs/serve.md says of a plan.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.blueprint import build_on_meta
from moetier.runtime.checkpoint.safetensors_folder import INDEX
from moetier.runtime.config import TierConfig
from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.machine.memory import PROCESS_BYTES, Available
from moetier.tiers.layout import BITS
from moetier.tools.launch.clients import CLIENTS
from moetier.tools.plan.choices import Choice, ModelChoices, open_choices
from moetier.tools.plan.estimate import CONTEXT_TOKENS, Caching, long_prompts, token_cost
from moetier.tools.plan.fit import Fit, MachineResources, fit_of
from moetier.tools.plan.speeds import DiskRate, MachineRates
from moetier.tools.synthetic.checkpoint import config_of

QWEN3_30B, GPT_OSS_20B = config_of("qwen3-30b-a3b"), config_of("gpt-oss-20b")
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "vocab_size": 129280,
    "max_position_embeddings": 163840,
}  # fmt: skip
CONFIGS: dict[str, Mapping[str, Any]] = {
    "openai/gpt-oss-20b": GPT_OSS_20B,
    "openai/gpt-oss-120b": GPT_OSS_20B | {"num_hidden_layers": 36, "num_local_experts": 128},
    "Qwen/Qwen3-30B-A3B": QWEN3_30B,
    "Qwen/Qwen3-235B-A22B": QWEN3_30B | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": config_of("mixtral-4L") | {"num_hidden_layers": 32, "vocab_size": 32000},
    "deepseek-ai/DeepSeek-V3": DEEPSEEK_V3,
}  # fmt: skip
GIB = 1 << 30
CONTEXT = 8192
# of a machine that is not here: a disk of 3.5 GB/s, products at 20 GB/s, 2.5 us for a small operation of torch
DISK, OPERATION = DiskRate(3.5e9, 3.5e9, 4), 2.5e-6
STATED = MachineRates(DISK, 20e9, dict.fromkeys(BITS, 20e9), dict.fromkeys(BITS, 200e9), 20e9, OPERATION)
FASTER = MachineRates(DISK, 40e9, dict.fromkeys(BITS, 40e9), dict.fromkeys(BITS, 400e9), 40e9, OPERATION)
CODING, CODING_CONTEXT = "Qwen/Qwen3-30B-A3B", 32768  # the model for programs for coding
SENSIBLE_HITS = 0.8  # share of a token's experts that is in memory with the least sensible memory


@dataclass(frozen=True)
class Way:
    """A machine, and a model of the hub for it. ``daemons``: how many machines hold experts, with ``ram`` GiB each."""

    machine: str
    free: int  # GiB of memory
    model: str  # its id, of CONFIGS
    daemons: int = 0
    ram: int = 0


WAYS = (
    Way("laptop, 16 GB", 12, "openai/gpt-oss-20b"),
    Way("laptop, 16 GB", 12, "Qwen/Qwen3-30B-A3B"),
    Way("laptop, 32 GB", 26, "openai/gpt-oss-20b"),
    Way("laptop, 32 GB", 26, "Qwen/Qwen3-30B-A3B"),
    Way("laptop, 32 GB", 26, "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    Way("laptop, 32 GB", 26, "openai/gpt-oss-120b"),
    Way("workstation, 64 GB", 56, "openai/gpt-oss-120b"),
    Way("workstation, 64 GB", 56, "Qwen/Qwen3-235B-A22B"),
    Way("server, 256 GB", 240, "Qwen/Qwen3-235B-A22B"),
    Way("cluster, 4 x 128 GB", 120, "deepseek-ai/DeepSeek-V3", daemons=4, ram=100),
)


@cache
def choices_of(model_id: str) -> ModelChoices:
    """Return the choices for a model of which there is only its config.json and the names of its weights."""
    config = CONFIGS[model_id]
    model, _ = build_on_meta(config, None)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), "model.safetensors")}))
        return open_choices(folder)


def fitted(model_choices: ModelChoices, free: int, **options: int) -> Fit:
    """Return how the choice of 4 bits with a trunk of 8 fits into ``free`` GiB. ``options``: of TierConfig."""
    (choice,), cpu = model_choices.chosen([4], [8]), Cpu()
    available = Available(free * GIB - PROCESS_BYTES, "this machine")
    resources = MachineResources(available, cpu, None, disk_free=1 << 50, idle_bytes=0, into=Path())
    config = TierConfig.of(**{"context": CONTEXT, **options})
    return fit_of(model_choices, choice, config, resources, cpu.kernels())


def planned(way: Way) -> tuple[Choice, str, str, str]:
    """Return the choice of 4 bits with a trunk of 8, the share of the experts in memory, their hits, and tokens/s.

    The speed is that of STATED; "-" if other machines hold the experts.
    """
    fit = fitted(choices_of(way.model), way.free)
    choice = fit.choice
    assert fit.works, fit.problem
    slots: Mapping[str, int] = fit.slots
    if way.daemons:
        assert choice.manifest.stored_bytes <= way.daemons * way.ram * GIB, "the daemons have room for all experts"
        slots = {block.array: choice.manifest.record_count for block in choice.manifest.blocks}
    share = min(1.0, sum(slots.values()) / choice.manifest.record_count)
    caching = Caching.of(choice.manifest, slots)
    speed = "-" if way.daemons else f"{speed_of(fit, STATED):.1f}"
    return choice, "all" if share == 1 else f"{share:.0%}", f"{caching.mean(choice.manifest):.0%}", speed


def download(model_id: str) -> int:
    """Return the GiB of the checkpoint's weights: of 16 bits, but for gpt-oss's experts, which MXFP4 keeps in 4.25."""
    model_choices = choices_of(model_id)
    ((choice,), nbytes) = model_choices.chosen([16], [16]), model_choices.source_bytes
    if "gpt-oss" in model_id:
        nbytes -= round(choice.manifest.stored_bytes * (1 - 4.25 / 16))
    return round(nbytes / GIB)


def speed_of(fit: Fit, rates: MachineRates) -> float:
    """Return the tokens per second that the plan's formula gives."""
    kv = fit.needs.kv
    nbytes = min(kv.nbytes, kv.page_bytes * (CONTEXT_TOKENS // PAGE_TOKENS))
    return 1 / token_cost(fit.choice, Caching.of(fit.choice.manifest, fit.slots), rates, nbytes)[0].seconds


def gain_of(way: Way) -> float:
    """Return how many times as fast a model is if weights are multiplied at twice the rate of STATED."""
    fit = fitted(choices_of(way.model), way.free)
    return speed_of(fit, FASTER) / speed_of(fit, STATED)


@cache
def smallest(model_id: str) -> int:
    """Return the least whole GiB of free memory with SENSIBLE_HITS."""
    model_choices = choices_of(model_id)

    def is_enough(free: int) -> bool:
        fit = fitted(model_choices, free)
        manifest = fit.choice.manifest
        return fit.works and Caching.of(manifest, fit.slots).mean(manifest) >= SENSIBLE_HITS

    assert is_enough(255), f"{model_id} needs more"
    return bisect_left(range(1, 256), True, key=is_enough) + 1


def row(way: Way) -> str:
    """Return the row of the table."""
    choice, share, hits, speed = planned(way)
    sizes = ["-" if way.daemons else str(download(way.model)), f"{choice.disk_bytes / GIB:.0f}"]
    cells = [f"{way.machine}: {way.free}", way.model, *sizes, share, hits, speed]
    return f"| {' | '.join([*cells, '-' if way.daemons else str(smallest(way.model))])} |"


def coding(kv_bits: int) -> str:
    """Return what a laptop of 16 GB permits with a context that programs for coding need."""
    fit = fitted(choices_of(CODING), WAYS[0].free, context=CODING_CONTEXT, kv_bits=kv_bits)
    manifest = fit.choice.manifest
    share, hits = sum(fit.slots.values()) / manifest.record_count, Caching.of(manifest, fit.slots).mean(manifest)
    return f"{share:.0%} of the experts in memory, hits of {hits:.0%}, {speed_of(fit, STATED):.1f} tokens/s"


def first_prompt(program: str) -> str:
    """Return the first cells of the row of a program for coding, with the minutes of its first prompt."""
    tokens, model_choices = CLIENTS[program].prompt_tokens, choices_of(CODING)
    fit = fitted(model_choices, WAYS[0].free, context=CODING_CONTEXT, kv_bits=8)
    caching = Caching.of(fit.choice.manifest, fit.slots)
    (prompt,) = long_prompts(model_choices.model, fit, caching, STATED, [tokens])
    return f"| `{program}` | about {round(tokens, -2):,} | {prompt['seconds'] / 60:.0f}"


if __name__ == "__main__":
    print(*map(row, WAYS), coding(16), coding(8), *map(first_prompt, CLIENTS), sep="\n")
