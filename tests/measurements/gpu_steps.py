"""The steps of ``gpu.py``, each in a process of its own: ``python gpu_steps.py FUNCTION RESULT``, arguments as JSON on
standard input."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/tiers/device/test_tier.py",
    "tests/runtime/kernels/test_int4.py",
    "tests/runtime/moe/test_on_a_device.py",
)
SIMULATED = "simulated"  # name of the simulated device
PROMPT = 512


class Card:
    """The device, real or simulated."""

    def __init__(self, simulate: bool) -> None:
        self.is_simulated = simulate
        self.option = SIMULATED if simulate else "cuda"
        self.torch_device = torch.device("cpu" if simulate else "cuda")
        if simulate:
            from toy_device import Toy

            from moetier.runtime.device_names import DEVICES

            DEVICES[SIMULATED], Toy.block_kernels = "toy_device:Toy", self.block_kernels

    @property
    def block_kernels(self) -> Any:
        """Triton's kernels; for the simulated device in Triton's interpreter, or else a reference in torch."""
        if not self.is_simulated:
            from moetier.runtime.kernels.triton_experts import SlotExperts
        elif os.environ.get("TRITON_INTERPRET") == "1":
            from triton_interpreter import SlotExperts
        else:
            from torch_experts import TorchExperts as SlotExperts
        return SlotExperts

    def synchronize(self) -> None:
        """Wait for all work of the device."""
        if not self.is_simulated:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Return the seconds of ``work``, on average, after a first run."""
        work()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return (time.perf_counter() - began) / repeats

    def scaled(self, number: int) -> int:
        """Return a number for the real device, and a small part of it for the simulated one."""
        return max(number >> 10, 1) if self.is_simulated else number


def machine(card: Card, **_: Any) -> dict[str, Any]:
    """Name the card; measure the rates of its memory, of its link, and of copies through the ring."""
    from moetier.runtime.devices.device import chosen_device
    from moetier.tiers.device.ring import Ring

    size = card.scaled(1 << 30)
    here = torch.empty(size, dtype=torch.uint8, device=card.torch_device)
    other, host = torch.empty_like(here), torch.ones(size, dtype=torch.uint8)
    found: dict[str, Any] = {"torch": torch.__version__}
    if not card.is_simulated:
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found |= {"capability": [properties.major, properties.minor], "processors": properties.multi_processor_count}
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max",
            "--format=csv,noheader",
        ]
        found["driver and link"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    found["memory_bytes_per_s"] = 2 * size / card.seconds(lambda: other.copy_(here), 10)
    found["pageable_bytes_per_s"] = size / card.seconds(lambda: here.copy_(host), 3)
    if not card.is_simulated:
        pinned = host.pin_memory()
        found["pinned_bytes_per_s"] = size / card.seconds(lambda: here.copy_(pinned, non_blocking=True), 3)
        found["host_copy_bytes_per_s"] = size / card.seconds(lambda: pinned.copy_(host), 3)
    ring = Ring(chosen_device(card.option).streams(), size)
    found["ring_bytes_per_s"] = size / card.seconds(lambda: ring.copy(host, here).synchronize(), 3)
    return found


def correctness(card: Card, **_: Any) -> dict[str, Any]:
    """Run the tests of the device tier and its kernels; those marked cuda on a GPU."""
    chosen = [TESTS[2], "-k", "blocks_are_computed and mixtral and 4"] if card.is_simulated else [*TESTS, "-m", "cuda"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x" if card.is_simulated else "--maxfail=20",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout[-6000:]
    return {"tests": done.stdout.strip().splitlines()[-1]}


def shapes(card: Card) -> list[tuple[str, int, int, int, int]]:
    """Return name, hidden, inner, experts and top-k of some models' blocks."""
    if card.is_simulated:
        return [("toy", 128, 64, 4, 2)]
    return [("Qwen3-30B-A3B", 2048, 768, 128, 8), ("Mixtral-8x7B", 4096, 14336, 8, 2)]


def experts_of(card: Card, hidden: int, inner: int, experts: int, bits: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return a layout, slots with records at random, uint8 [experts, slot bytes], and the table of their addresses."""
    import numpy as np

    from moetier.tiers.quant.codec import encode, layout_for

    shapes = {"gate_up_proj": ((2 * inner, hidden), "bfloat16"), "down_proj": ((hidden, inner), "bfloat16")}
    layout = layout_for(shapes, bits=bits)
    out = np.zeros(layout.record_bytes, np.uint8)
    weights = {name: torch.randn(shape) * 0.02 for name, (shape, _) in shapes.items()}
    encode(weights, layout, out, fast=True)
    slots = torch.zeros((experts, layout.slot_bytes), dtype=torch.uint8, device=card.torch_device)
    slots[:, : layout.record_bytes] = torch.from_numpy(out).to(card.torch_device)
    table = torch.tensor([slots[expert].data_ptr() for expert in range(experts)], device=card.torch_device)
    return layout, slots, table


def kernels_are_right(card: Card, **_: Any) -> dict[str, Any]:
    """Compare Triton's kernels with decoded weights, for one token and for many: relative errors."""
    from moetier.runtime.kernels.experts.expert_code import Activation
    from moetier.runtime.kernels.products.api import Kernels

    errors = {}
    for (name, hidden, inner, experts, top_k), bits, tokens in itertools.product(shapes(card), (4, 16), (1, 5, 64)):
        layout, slots, table = experts_of(card, hidden, inner, experts, bits)
        x = torch.randn(tokens, hidden, device=card.torch_device, dtype=torch.bfloat16)
        index = torch.rand(tokens, experts, device=card.torch_device).topk(top_k).indices
        weights = torch.rand(tokens, top_k, device=card.torch_device)
        sums, late = card.block_kernels(layout, Activation(), experts).begin(x, index, weights), table.clone()
        late[::2] = 0
        for part in (late, table - late):  # the second finds the counters as the first has left them
            sums.add(part)
        plain = Kernels(card.torch_device)
        gate, up = plain.project(x.float(), slots[0], layout, "gate_up_proj").chunk(2, -1)
        ideal = plain.project(torch.nn.functional.silu(gate) * up, slots[0], layout, "down_proj")
        ideal *= weights.sum(1, keepdim=True)  # all slots have the same record
        errors[f"{name}, {bits} bits, {tokens} tokens"] = float((sums.result().float() - ideal).norm() / ideal.norm())
    assert max(errors.values()) < 0.01, errors
    return errors


def kernel_rates(card: Card, **_: Any) -> dict[str, Any]:
    """Measure the bytes of records a second that a block of one token reads: all experts together, and one by one."""
    from moetier.runtime.devices.device import chosen_device
    from moetier.runtime.kernels.experts.expert_code import Activation

    found: dict[str, Any] = {}
    for (name, hidden, inner, experts, top_k), bits in itertools.product(shapes(card), (4, 16)):
        layout, slots, table = experts_of(card, hidden, inner, experts, bits)
        x = torch.randn(1, hidden, device=card.torch_device, dtype=torch.bfloat16)
        weights = torch.rand(1, top_k, device=card.torch_device)
        rows = itertools.cycle([torch.arange(n, n + top_k)[None] % experts for n in range(0, experts, top_k)])
        nbytes, rates = top_k * layout.payload_bytes, {}
        kernels = card.block_kernels(layout, Activation(), experts)
        indices = itertools.cycle([next(rows).to(card.torch_device) for _ in range(experts // top_k)])

        def together() -> None:
            kernels.begin(x, next(indices), weights).add(table)  # noqa: B023  # used in this turn only

        rates["together"] = nbytes / card.seconds(together, card.scaled(1 << 11))
        plain = chosen_device(card.option).kernels()
        if plain.arrange is not None:
            for slot in slots:
                plain.arrange(slot[: layout.record_bytes], layout)

        def one_by_one() -> None:
            for expert in next(rows)[0].tolist():  # noqa: B023
                gate, up = plain.project(x, slots[expert], layout, "gate_up_proj").chunk(2, -1)  # noqa: B023
                plain.project(torch.nn.functional.silu(gate) * up, slots[expert], layout, "down_proj")  # noqa: B023

        rates["one by one"] = nbytes / card.seconds(one_by_one, card.scaled(1 << 9))
        found[f"{name}, {bits} bits"] = {way: round(rate) for way, rate in rates.items()}
    return found


def make_model(card: Card, folder: str, **_: Any) -> dict[str, Any]:
    """Make a checkpoint, and a model with 4 bits from it."""
    source, model = places(card, folder)
    if card.is_simulated:
        from moetier.tools.convert.api import convert

        convert(source, model, bits=4, fast=True)
    elif not (model / "done").exists():
        words = ["synthetic", str(source), "--geometry", "qwen3-8L", "--store", str(model)]
        subprocess.run([sys.executable, "-m", "moetier.tools.main", *words], check=True)
        (model / "done").touch()
    return {"model": str(model)}


def places(card: Card, folder: str) -> tuple[Path, Path]:
    """Return the folders of the checkpoint and of the model."""
    source = ROOT / "tests" / "assets" / "tinymix" if card.is_simulated else Path(folder, "checkpoint")
    return source, Path(folder, "model")


@contextlib.contextmanager
def loaded(card: Card, folder: str, share: float, **options: Any) -> Iterator[Any]:
    """Load the model with slots for a share of its experts; 0: for those that one token needs in one block."""
    import moetier
    from moetier.runtime.stores.registry import read_manifest
    from moetier.tiers.cache.budget import smallest_budget

    model = places(card, folder)[1]
    manifest = read_manifest(model)
    sizes = [block.experts * manifest.layout(number).slot_bytes for number, block in enumerate(manifest.blocks)]
    room = max(round(share * sum(sizes)), smallest_budget(manifest))
    loaded, _ = moetier.load(model, daemon=None, device=card.option, device_memory=room, ram="100%", **options)
    with loaded.tiers, torch.inference_mode():
        yield loaded


def tokens_of(card: Card, model: Any) -> tuple[list[int], int]:
    """Return the tokens to feed, and how many of them come before those that are measured."""
    numbers = torch.Generator().manual_seed(0)
    count, warm = (12, 4) if card.is_simulated else (192, 64)
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.rand(count, generator=numbers) ** 2 * vocabulary).long().tolist(), warm


def feed(card: Card, model: Any, *, profiles: bool = False) -> dict[str, Any]:
    """Feed tokens one by one, and return the speed; with the profile of one more step."""
    from transformers import DynamicCache

    from moetier.runtime.generation.compat import CACHE

    (tokens, warm), cache, began = tokens_of(card, model), DynamicCache(), 0.0

    def next_token(token: int) -> None:
        model(input_ids=torch.tensor([[token]], device=card.torch_device), **{CACHE: cache}, use_cache=True)

    for position, token in enumerate(tokens):
        if position == warm:
            card.synchronize()
            began = time.perf_counter()
        next_token(token)
    card.synchronize()
    found: dict[str, Any] = {"tokens_per_s": round((len(tokens) - warm) / (time.perf_counter() - began), 3)}
    if profiles:
        with torch.profiler.profile() as profile:
            next_token(tokens[0])
            card.synchronize()
        events = profile.key_averages()
        found["launches"] = sum(
            event.count for event in events if event.key in ("cudaLaunchKernel", "cuLaunchKernelEx")
        )
        found["profile"] = events.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60)
    return found


def decode(
    card: Card, folder: str, share: float, profiles: bool = False, speculate: str = "always", together: bool = True
) -> dict[str, Any]:
    """Decode with slots for a share of the experts; the host's memory has all of them."""
    from moetier.runtime.devices.device import ComputeDevice, device_class
    from moetier.runtime.kernels.slots import SlotKernels

    if not together:
        device_class(card.option).slot_kernels = ComputeDevice.slot_kernels  # type: ignore[method-assign]
    with loaded(card, folder, share, speculate=speculate) as model:
        assert isinstance(model.tiers.kernels, SlotKernels) == together
        found = feed(card, model, profiles=profiles)
        tier = model.tiers.snapshot()["device"]
        return found | {name: tier[name] for name in ("slots", "hits", "misses")}


def prefill(card: Card, folder: str, share: float) -> dict[str, Any]:
    """Compute a prompt, after a first one."""
    length = 24 if card.is_simulated else PROMPT
    with loaded(card, folder, share, speculate="off") as model:
        vocabulary = model.config.get_text_config().vocab_size
        prompt = torch.randint(vocabulary, (1, length), device=card.torch_device)
        seconds = card.seconds(lambda: model(input_ids=prompt), 1 if card.is_simulated else 3)
        return {"tokens_per_s": round(length / seconds, 3)}


def transformers_decode(card: Card, folder: str, share: float = 0.0) -> dict[str, Any]:
    """Decode with transformers in bf16: all on the device; or by accelerate, a share of the model there."""
    from transformers import AutoModelForCausalLM

    source = places(card, folder)[0]
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    where: dict[str, Any] = {"device_map": {"": str(card.torch_device)}}
    if share:
        rooms: dict[Any, int] = (
            {"cpu": round(share * size)} if card.is_simulated else {0: round(share * size), "cpu": 2 * size}
        )
        where = {"device_map": "auto", "max_memory": rooms, "offload_folder": str(Path(folder, "offload"))}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **where)
    with torch.inference_mode():
        return feed(card, model)


def main() -> None:
    """Run one step."""
    function, result = sys.argv[1:]
    given = json.load(sys.stdin)
    found = globals()[function](Card(given.pop("simulate")), **given)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
