"""Models that ``moetier synthetic`` makes: sizes, random tensors, and a routing like that of a trained model.

Every matrix keeps the scale of its inputs: the standard deviation of its weights is 1 / sqrt(number of inputs).
Matrices that write to the residual stream have smaller weights: an attention or a block adds about a third of the scale
of an embedding, so that every layer changes the stream a little, as in a trained model.

A trained model uses some experts more often than others while a text keeps to its topic. A random model that decodes
random tokens would use all experts alike, and a cache would hit only by chance. So tokens have topics here: token t has
the topic t mod TOPICS, and a part (``share``) of its embedding's variance is the same for all tokens of the topic. The
fixed token ids keep to a topic for a while, and follow Zipf's law within it. Gates are random; what they choose depends
on the token and on its topic. It is one long module, as sizes, tensors and routing depend on each other.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tools.cli.report import table

if TYPE_CHECKING:
    from moetier.runtime.trace.trace import Trace


GEOMETRIES: dict[str, dict[str, Any]] = {
    "mixtral-4L": {  # 4 of the 32 blocks of Mixtral-8x7B; the bundled model's vocabulary
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
    },
    "qwen3-8L": {  # 8 of the 48 blocks of Qwen3-30B-A3B
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
    "fine-4L": {  # many small experts: 512 of 2048 x 512, in the architecture of Qwen3-30B-A3B
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "vocab_size": 201088,
    },
}
GEOMETRIES["qwen3-30b-a3b"] = GEOMETRIES["qwen3-8L"] | {"num_hidden_layers": 48, "vocab_size": 151936}
WHOLE = ("gpt-oss-20b", "qwen3-30b-a3b")  # models with all blocks and their own vocabulary, made without a checkpoint
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GATE_GAIN = 1.5  # standard deviation of a gate's logits
OUTPUT_GAIN = 0.55  # factor for weights that write to the residual stream


def config_of(geometry: str, blocks: int | None = None, sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values of a geometry's config.json. ``blocks`` and ``sizes`` replace some of them."""
    config = {**COMMON, **GEOMETRIES[geometry], **(sizes or {})}
    return config if blocks is None else config | {"num_hidden_layers": blocks}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, by name, as in published checkpoints of the architecture."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, queries)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        experts = config.get("num_experts") or config["num_local_experts"]
        if config["model_type"] == "gpt_oss":
            shapes |= _of_gpt_oss(prefix, config, queries, keys)
            continue
        if config["model_type"] == "qwen3_moe":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (head,)
            moe, names, inner = "mlp", ("gate_proj", "down_proj", "up_proj"), config["moe_intermediate_size"]
        else:
            moe, names, inner = "block_sparse_moe", ("w1", "w2", "w3"), config["intermediate_size"]
        shapes[f"{prefix}.{moe}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in zip(names, ((inner, hidden), (hidden, inner), (inner, hidden)), strict=True):
                shapes[f"{prefix}.{moe}.experts.{expert}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _of_gpt_oss(prefix: str, config: dict[str, Any], queries: int, keys: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that only layers of gpt-oss have: biases, sinks, the router, and all experts in one tensor."""
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    return {
        f"{prefix}.self_attn.q_proj.bias": (queries,),
        f"{prefix}.self_attn.k_proj.bias": (keys,),
        f"{prefix}.self_attn.v_proj.bias": (keys,),
        f"{prefix}.self_attn.o_proj.bias": (hidden,),
        f"{prefix}.self_attn.sinks": (config["num_attention_heads"],),
        f"{prefix}.mlp.router.weight": (experts, hidden),
        f"{prefix}.mlp.router.bias": (experts,),
        f"{prefix}.mlp.experts.gate_up_proj": (experts, hidden, 2 * inner),
        f"{prefix}.mlp.experts.gate_up_proj_bias": (experts, 2 * inner),
        f"{prefix}.mlp.experts.down_proj": (experts, inner, hidden),
        f"{prefix}.mlp.experts.down_proj_bias": (experts, hidden),
    }


def deviation_of(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> float:
    """Return the standard deviation of a matrix's weights; for a vector, the value that all its elements have."""
    if name.endswith(("bias", "sinks")):
        return 0.0
    if len(shape) == 1:
        return 1.0
    plain = 1 / math.sqrt(shape[1])  # number of inputs, in a matrix and in gpt-oss's [experts, inputs, outputs]
    if name.endswith((".gate.weight", ".router.weight")):
        return GATE_GAIN * plain
    if name.endswith("o_proj.weight"):
        return OUTPUT_GAIN * plain
    if name.endswith(("w2.weight", "down_proj.weight", "down_proj")):
        # the mean of k independent outputs is smaller by sqrt(k)
        return OUTPUT_GAIN * math.sqrt(config["num_experts_per_tok"]) * plain
    return plain


TOPICS = 64
TOKENS_FILE = "tokens.json"
TOKENS = 8192  # number of token ids in TOKENS_FILE
TRACED = 1024  # number of token ids, the first of the file, with which hit ratios are measured


@dataclass(frozen=True)
class RoutingModel:
    """Parameters of a geometry's routing, and the hit ratios that it should have."""

    share: float  # fraction of an embedding's variance that all tokens of its topic have in common
    stay: float  # probability that the next token has the same topic
    model: str  # trained model whose hit ratios ``curve`` gives
    curve: Mapping[int, float]  # hit ratio of an LRU that begins empty, by the number of slots that each block has


MIXTRAL = {1: 0.166, 2: 0.327, 3: 0.453, 4: 0.574, 5: 0.689, 6: 0.799, 7: 0.902, 8: 0.995}
ROUTINGS = {
    "mixtral-4L": RoutingModel(0.05, 0.85, "Mixtral-8x7B-Instruct", MIXTRAL),
    "qwen3-8L": RoutingModel(0.8, 0.96, "Qwen3-30B-A3B", {8: 0.428, 16: 0.611, 32: 0.807, 64: 0.912}),
    # no trace exists for these two: their curves are Qwen3's, at the same multiples of the experts that a token uses
    "fine-4L": RoutingModel(0.8, 0.97, "as Qwen3-30B-A3B", {10: 0.428, 20: 0.611, 40: 0.807, 80: 0.912}),
    "gpt-oss-20b": RoutingModel(0.8, 0.96, "as Qwen3-30B-A3B", {4: 0.428, 8: 0.611, 16: 0.807}),
}
ROUTINGS["qwen3-30b-a3b"] = ROUTINGS["qwen3-8L"]


def token_ids(geometry: str, vocabulary: int, *, count: int = TOKENS, seed: int = 0) -> list[int]:
    """Return ``count`` token ids that are always the same, so that all measured engines decode the same tokens."""
    numbers = random.Random(f"{geometry} {seed}")
    ranks = range(1, vocabulary // TOPICS)  # from 1, as the first tokens of a vocabulary are not words
    chances = list(itertools.accumulate(1 / rank for rank in ranks))
    topic, tokens = numbers.randrange(TOPICS), []
    for _ in range(count):
        if numbers.random() >= ROUTINGS[geometry].stay:
            topic = numbers.randrange(TOPICS)
        rank = ranks[bisect.bisect(chances, numbers.random() * chances[-1], hi=len(ranks) - 1)]
        tokens.append(topic + TOPICS * rank)
    return tokens


def tokens_json(geometry: str, vocabulary: int, seed: int) -> bytes:
    """Return the content of TOKENS_FILE for a synthetic model."""
    ids = token_ids(geometry, vocabulary, seed=seed)
    return json.dumps({"geometry": geometry, "seed": seed, "token_ids": ids}).encode() + b"\n"


def read_tokens(folder: Path) -> list[int]:
    """Read the token ids from a folder that ``moetier synthetic`` made: a checkpoint, or its model directory."""
    return json.loads((folder / TOKENS_FILE).read_bytes())["token_ids"]


def record_tokens(model: Any, ids: Sequence[int]) -> Trace:
    """Record a trace of the experts that a loaded model uses for the tokens ``ids``.

    The model gets all tokens at once, but the trace has no prompt, so that a simulation decodes them one by one.
    """
    import torch

    from moetier.runtime.trace.recorder import Recorder

    with torch.inference_mode(), Recorder(model, look_ahead=1) as recorder:
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
        recorder.end_sequence(ids, n_prefill=0)
        return recorder.trace()


def lru_curve(trace: Trace, slots: Sequence[int]) -> dict[int, float]:
    """Simulate LRU caches on a trace. Return the hit ratio for each number in ``slots``, the slots that a block has."""
    from moetier.tools.traces.simulation import simulate

    return {number: simulate(trace, "lru", number).decoding.hit_ratio for number in slots}


def curve_table(geometry: str, trace: Trace) -> str:
    """Return a table of three hit ratios: of the trace, of the trained model, and of experts chosen at random."""
    routing = ROUTINGS[geometry]
    curve = lru_curve(trace, list(routing.curve))
    chance = trace.num_experts[0]
    rows = [["slots", *map(str, curve)]]
    rows += [[name, *(f"{ratio:.3f}" for ratio in ratios)] for name, ratios in (
        (geometry, curve.values()), (routing.model, routing.curve.values()), ("chance", (n / chance for n in curve)),
    )]  # fmt: skip
    return f"hit ratio of an LRU in each block, {trace.tokens} tokens\n{table(rows)}"


# size of the pool of random numbers; a prime, so that rows whose length is a power of two begin at many places in it
POOL_WEIGHTS = (1 << 24) - 3
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def tinymix() -> Path:
    """Return the folder of the bundled model, whose tokenizer is copied into synthetic models."""
    return Path(str(files("moetier.assets"))) / "tinymix"


def special_tokens() -> dict[str, Any]:
    """Return the bundled model's ids of special tokens, by their names in a config.json."""
    config = json.loads((tinymix() / "config.json").read_bytes())
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
