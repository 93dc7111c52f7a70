"""Compare a checkpoint in MXFP4 that is used as it is with a model directory that has the same bytes.

    python tests/measurements/native.py FOLDER [--blocks 24] [--rounds 3]

Writes a checkpoint of gpt-oss-20b's geometry with random weights to FOLDER/checkpoint (12 GB), links it, and converts
it to FOLDER/store with ``--bits native``. Then ``moetier bench decode`` measures both by turns: with room for all
experts, and for half of them. What exists in FOLDER is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from moetier.tools.bench.sandbox import drop_page_cache
from moetier.tools.synthetic.checkpoint import config_of

GEOMETRY = "gpt-oss-20b"
STEPS = ("--tokens", "32", "--warm", "48", "--rounds", "1")


def main() -> None:
    """Make what is missing, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint, store = arguments.folder / "checkpoint", arguments.folder / "store"
    if not (checkpoint / "config.json").exists():
        write_checkpoint(checkpoint, arguments.blocks)
    shards = sorted(checkpoint.glob("*.safetensors"))
    drop_page_cache(shards, whole=False)
    print("raw        ", f"{raw_rate(shards) / 1e9:.2f} GB/s, reads of 8 MiB with O_DIRECT, one after the other")
    drop_page_cache(shards, whole=False)
    print("link       ", moetier("link", checkpoint).strip().splitlines()[-1])
    if not store.exists():
        print("convert    ", moetier("convert", checkpoint, store, "--bits", "native").strip().splitlines()[-1])
    half = sum(shard.stat().st_size for shard in shards) // 2
    for name, ram in (("all", []), ("half", ["--ram", str(half)])):
        results: dict[str, list[dict[str, Any]]] = {"as it is": [], "store": []}
        for number in range(arguments.rounds):
            ways = list(zip(results, (checkpoint, store), strict=True))
            for way, folder in ways if number % 2 == 0 else reversed(ways):
                results[way].append(decode(folder, ram, arguments.folder / "result.json"))
        for way, runs in results.items():
            print(f"{name:<5} {way:<9}", *(summary(runs, key) for key in ("tokens_per_s", "load_s")), end=" ")
            print(summary(runs, "bytes_read_per_token"), f"hits {runs[-1]['hit_ratio']:.3f}")
        ratios = [
            one["tokens_per_s"]["median"] / other["tokens_per_s"]["median"]
            for one, other in zip(results["as it is"], results["store"], strict=True)
        ]
        print(f"{name:<5} ratio     {math.exp(statistics.fmean(map(math.log, ratios))):.3f}", [*map(_short, ratios)])


def _short(number: float) -> str:
    return f"{number:.4g}"


def summary(runs: list[dict[str, Any]], key: str) -> str:
    """Return the median of runs, with the least and the most."""
    numbers = [run[key]["median"] if isinstance(run[key], dict) else run[key] for run in runs]
    return f"{key} {_short(statistics.median(numbers))} ({_short(min(numbers))} to {_short(max(numbers))})"


def moetier(*words: object) -> str:
    """Run a command of moetier and return what it prints."""
    command = [sys.executable, "-W", "ignore", "-m", "moetier", *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def decode(folder: Path, ram: list[str], file: Path) -> dict[str, Any]:
    """Run ``moetier bench decode`` once and return its result."""
    moetier("bench", "decode", folder, *ram, *STEPS, "--json", file)
    results = json.loads(file.read_text())["results"]
    result: dict[str, Any] = results[0]
    return result


def raw_rate(files: list[Path]) -> float:
    """Return at how many bytes a second ``dd`` reads files with O_DIRECT."""
    begun, size = time.perf_counter(), 0
    for file in files[: len(files) // 4 + 1]:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=8M", "iflag=direct"], check=True, capture_output=True)
        size += file.stat().st_size
    return size / (time.perf_counter() - begun)


def write_checkpoint(folder: Path, blocks: int) -> None:
    """Write a checkpoint with random weights, a shard for each block and one for the rest."""
    folder.mkdir(parents=True)
    config = config_of(GEOMETRY, blocks) | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    }
    chance = np.random.default_rng(0)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
        )
    index: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in made.state_dict().items():
        parts = name.split(".")
        shard = f"model-{int(parts[2]):05}.safetensors" if parts[1] == "layers" else "model-trunk.safetensors"
        shards.setdefault(shard, {})[name] = parameter.shape
    for shard, names in shards.items():
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in names.items():
            if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name:
                experts, columns, rows = shape
                codes = (experts, rows, columns // 32, 16)
                tensors[f"{name}_blocks"] = torch.from_numpy(chance.integers(0, 256, codes, np.uint8))
                tensors[f"{name}_scales"] = torch.from_numpy(chance.integers(116, 121, codes[:3], np.uint8))
            elif "norm" in name:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                values = torch.from_numpy(chance.standard_normal(tuple(shape), np.float32))
                tensors[name] = (values * 0.02).to(torch.bfloat16)
        save_file(tensors, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
