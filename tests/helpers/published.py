"""Sizes of some published models, and what `moetier plan` says of them with a given memory.

``python tests/helpers/published.py`` prints the rows of the table "Which way for me" in README.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.blueprint import build_on_meta
from moetier.runtime.checkpoint.safetensors_folder import INDEX
from moetier.runtime.config import TierConfig
from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.machine.memory import PROCESS_BYTES, Available
from moetier.tiers.text import format_bytes
from moetier.tools.plan.choices import Choice, ModelChoices, open_choices
from moetier.tools.plan.estimate import Caching
from moetier.tools.plan.fit import MachineResources, fit_of
from moetier.tools.synthetic.checkpoint import config_of

QWEN3_30B = config_of("qwen3-30b-a3b")
MIXTRAL_8X7B = config_of("mixtral-4L") | {"num_hidden_layers": 32, "vocab_size": 32000}
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
    "num_attention_heads": 64,
}  # fmt: skip
GLM_45_AIR = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46, "first_k_dense_replace": 1,
    "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
    "n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "vocab_size": 151552, "max_position_embeddings": 131072,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "vocab_size": 129280,
    "max_position_embeddings": 163840,
}  # fmt: skip
GIB = 1 << 30
CONTEXT = 8192


@dataclass(frozen=True)
class Way:
    """A machine, and a model of the hub for it. ``daemons``: how many machines hold experts, with ``ram`` GiB each."""

    machine: str
    free: int  # GiB of memory
    model: str
    config: Mapping[str, Any]
    daemons: int = 0
    ram: int = 0


WAYS = (
    Way("laptop, 16 GB", 12, "Qwen/Qwen3-30B-A3B", QWEN3_30B),
    Way("laptop, 32 GB", 26, "Qwen/Qwen3-30B-A3B", QWEN3_30B),
    Way("laptop, 32 GB", 26, "mistralai/Mixtral-8x7B-Instruct-v0.1", MIXTRAL_8X7B),
    Way("workstation, 64 GB", 56, "zai-org/GLM-4.5-Air", GLM_45_AIR),
    Way("workstation, 128 GB", 116, "Qwen/Qwen3-235B-A22B", QWEN3_235B),
    Way("server, 256 GB", 240, "Qwen/Qwen3-235B-A22B", QWEN3_235B),
    Way("cluster, 4 x 128 GB", 120, "deepseek-ai/DeepSeek-V3", DEEPSEEK_V3, daemons=4, ram=100),
)


def choices_of(config: Mapping[str, Any]) -> ModelChoices:
    """Return the choices for a model of which there is only its config.json and the names of its weights."""
    model, _ = build_on_meta(config, None)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), "model.safetensors")}))
        return open_choices(folder)


def planned(way: Way) -> tuple[Choice, str, str]:
    """Return the choice of 4 bits with a trunk of 8, the share of the experts in memory, and their hits."""
    model_choices, cpu = choices_of(way.config), Cpu()
    (choice,) = model_choices.chosen([4], [8])
    free = Available(way.free * GIB - PROCESS_BYTES, "this machine")
    resources = MachineResources(free, cpu, None, disk_free=1 << 50, idle_bytes=0, into=Path())
    fit = fit_of(model_choices, choice, TierConfig.of(context=CONTEXT), resources, cpu.kernels())
    assert fit.works, fit.problem
    slots: Mapping[str, int] = fit.slots
    if way.daemons:
        assert choice.manifest.stored_bytes <= way.daemons * way.ram * GIB, "the daemons have room for all experts"
        slots = {block.array: choice.manifest.record_count for block in choice.manifest.blocks}
    share = min(1.0, sum(slots.values()) / choice.manifest.record_count)
    hits = Caching.of(choice.manifest, slots).mean(choice.manifest)
    return choice, "all" if share == 1 else f"{share:.0%}", f"{hits:.0%}"


def row(way: Way) -> str:
    """Return the beginning of the table's row."""
    choice, share, hits = planned(way)
    return f"| {way.machine} | {way.free} GiB | {way.model} | {format_bytes(choice.disk_bytes)} | {share} | {hits} |"


if __name__ == "__main__":
    print(*map(row, WAYS), sep="\n")
