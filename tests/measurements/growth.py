"""Measure how the time of a token depends on layers, missing bytes, number of experts and size of the store.

    python tests/measurements/growth.py [FOLDER]

Makes nine models with random weights, with 2, 4 or 8 layers and 8, 32 or 128 experts, of which a token uses two (0.4 GB
together, at 4 bits). They are made in a temporary folder, or in FOLDER, where they stay for the next run. Each model is
loaded with several budgets, all in one process and without speculation, and every expert is demanded once. Then, in
each round, each model decodes the same tokens, one at a time.

Prints for each model and budget the missing MiB of a token and its time, the median over the rounds. ``ms/missing MiB``
is the additional time per missing MiB, compared with the largest budget of the same model. Then follows the
least-squares fit ms = c + a * layers + b * missing MiB over all models and budgets. Last, the number of experts, or the
stored bytes, is added to the fit as a third cause: it prints how much its range adds to the time, and the new R2.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import load_warm

from moetier.runtime.generation.compat import CACHE
from moetier.tiers.text import format_bytes
from moetier.tools.cli.report import table
from moetier.tools.synthetic.checkpoint import TOKENS_FILE, read_tokens
from moetier.tools.synthetic.store import convert_synthetic
from moetier.tools.synthetic.tensors import make_synthetic

GEOMETRY = "qwen3-8L"
SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 192, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2,
}  # fmt: skip
LAYERS, EXPERTS = (2, 4, 8), (8, 32, 128)
MIB = 1 << 20


@dataclass
class Setting:
    """A store with a budget, and what its tokens took, round by round."""

    layers: int
    experts: int
    ram: str
    model: Any
    seconds: list[float] = field(default_factory=list)
    missing: list[float] = field(default_factory=list)  # bytes

    @property
    def stored(self) -> int:
        return int(self.model.tiers.manifest.stored_bytes)

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def missing_mib(self) -> float:
        return statistics.fmean(self.missing) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="(default: a temporary one)")
    parser.add_argument("--ram", default="25%,50%,100%", help="budgets, of all experts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moetier-growth-") as temporary:
        base, settings = arguments.folder or Path(temporary), []
        for layers, experts in itertools.product(LAYERS, EXPERTS):
            store = make_store(base, layers, experts)
            settings += [Setting(layers, experts, ram, load_warm(store, ram)) for ram in arguments.ram.split(",")]
        ids = read_tokens(store)
        print(f"machine  {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads", flush=True)
        for number in range(-1, arguments.rounds):  # one that is not counted
            start = (number + 1) * arguments.tokens % (len(ids) - arguments.tokens)
            for setting in settings if number % 2 else settings[::-1]:
                decode(setting, ids[start : start + arguments.tokens + 1], is_counted=number >= 0)
        report(settings)


def make_store(base: Path, layers: int, experts: int) -> Path:
    target, source = base / f"{layers}-{experts}", base / "checkpoint"
    if not (target / TOKENS_FILE).exists():  # it is written last
        for folder in (source, target):
            shutil.rmtree(folder, ignore_errors=True)
        make_synthetic(source, geometry=GEOMETRY, blocks=layers, sizes=SIZES | {"num_experts": experts})
        convert_synthetic(source, target)
        shutil.rmtree(source)
    return target


@torch.inference_mode()
def decode(setting: Setting, ids: list[int], *, is_counted: bool) -> None:
    """All but the first of them are timed."""
    host = setting.model.tiers.host
    output = setting.model(torch.tensor([ids[:1]]), use_cache=True)
    began, before = time.perf_counter(), host.stats().bytes_in
    for token in ids[1:]:
        output = setting.model(torch.tensor([[token]]), **{CACHE: output.past_key_values}, use_cache=True)
    seconds, missing = time.perf_counter() - began, host.stats().bytes_in - before
    if is_counted:
        setting.seconds.append(seconds / (len(ids) - 1))
        setting.missing.append(missing / (len(ids) - 1))


def report(settings: list[Setting]) -> None:
    rows = [["layers", "experts", "stored", "ram", "slots", "missing MiB", "ms", "ms/layer", "ms/missing MiB"]]
    for s in settings:
        same = [t for t in settings if (t.layers, t.experts) == (s.layers, s.experts)]
        least = min(same, key=lambda setting: setting.missing_mib)
        more = s.missing_mib - least.missing_mib
        cost = f"{(s.ms - least.ms) / more:.3f}" if more else ""
        slots = sum(s.model.tiers.host.layout.slots_by_array.values())
        cells = [str(slots), f"{s.missing_mib:.3f}", f"{s.ms:.2f}", f"{s.ms / s.layers:.2f}", cost]
        rows.append([str(s.layers), str(s.experts), format_bytes(s.stored), s.ram, *cells])
    print(table(rows))
    causes = [[1.0, s.layers, s.missing_mib] for s in settings]
    (constant, by_layer, by_mib), r2 = fit(causes, settings)
    print(f"fit      ms = {constant:.3f} + {by_layer:.3f} * layers + {by_mib:.3f} * missing MiB, R2 {r2:.4f}")
    mean = statistics.fmean(s.ms for s in settings)
    thirds = {"experts": [s.experts for s in settings], "stored MiB": [s.stored / MIB for s in settings]}
    for name, values in thirds.items():
        (*_, slope), with_it = fit([[*row, value] for row, value in zip(causes, values, strict=True)], settings)
        span = slope * (max(values) - min(values))
        said = f"{name} from {min(values):.4g} to {max(values):.4g} add {span:+.3f} ms"
        print(f"besides  {said} to the mean of {mean:.2f}, {span / mean:+.1%}; R2 {with_it:.4f}")


def fit(causes: list[list[float]], settings: list[Setting]) -> tuple[list[float], float]:
    """(What each cause adds, R2)."""
    x, y = np.array(causes), np.array([s.ms for s in settings])
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    return coefficients.tolist(), float(1 - ((y - x @ coefficients) ** 2).sum() / ((y - y.mean()) ** 2).sum())


if __name__ == "__main__":
    sys.exit(main())
