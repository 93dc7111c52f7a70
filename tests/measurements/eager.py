"""Compare logits with those of transformers' eager experts: transformers' default (grouped_mm), and moetier.

    python tests/measurements/eager.py

The models are a tiny random Qwen3-MoE and tinymix, in bf16. For moetier they are converted with 16 bits.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import torch
import transformers
from architectures import tiny_model
from transformers import AutoModelForCausalLM

import moetier
from moetier.tools.convert.api import convert

TINYMIX = Path(__file__).parent.parent / "assets" / "tinymix"


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    print(f"machine  {platform.machine()}; torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        random = Path(folder, "random")
        tiny_model("qwen3_moe", torch.bfloat16).save_pretrained(random)
        for name, source in (("random Qwen3-MoE", random), ("tinymix", TINYMIX)):
            converted = Path(folder, name)
            convert(source, converted, bits=16)
            compare(name, source, converted)


def compare(name: str, source: Path, converted: Path) -> None:
    eager, grouped = (
        logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, experts_implementation=way))
        for way in ("eager", "grouped_mm")
    )
    default = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert torch.equal(logits(default), grouped), "grouped_mm is no longer the default"
    model, _ = moetier.load(converted, daemon=None, dtype=torch.bfloat16)
    with model.tiers:
        tiered = logits(model)
    for way, logits_of_way in (("grouped_mm", grouped), ("moetier", tiered)):
        same = (logits_of_way.argmax(-1) == eager.argmax(-1)).float().mean()
        apart = (logits_of_way - eager).abs().amax(-1)  # by position; more where a token is sent to another expert
        print(
            f"{name:<17} {way:<10} differs from eager by {apart.median():.4f} at the median position, "
            f"{apart.max():.4f} at most (largest logit {eager.abs().max():.1f}); "
            f"the likeliest token is the same at {same:.1%}"
        )


def logits(model: Any) -> torch.Tensor:
    """[1, tokens, vocabulary] in fp32, of a prompt of 512 tokens."""
    ids = torch.randint(2, 250, (1, 512), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=ids).logits.float()
    return values


if __name__ == "__main__":
    main()
