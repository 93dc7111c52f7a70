"""Estimates of every choice: sizes, tiers, speed and time. Pure functions, but for reading the bundled hit curves.

A step of decoding reads the missing records at the disk's rate, and then multiplies at the kernels' rate, as a block
waits for its records. Other operations of Python and torch take time too. In a prompt, reads and products overlap.

Hit ratios are interpolated in ``hit_curves.json``, which ``tests/measurements/hit_curves.py`` makes from traces of some
models. For other models they are an estimate.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.model.names import listed_name, tag_of
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.checksum import READ_PIECE_BYTES
from moetier.tools.cli.failure import as_options
from moetier.tools.traces.simulation import all_partitions

from .cards import by_data_sheet
from .choices import Choice, ModelChoices
from .fit import Fit, MachineResources, memory_of
from .speeds import MachineRates, Speeds

FILE = "hit_curves.json"


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Hit ratios in the decoding of one trace, by the share of each block's experts that are cached.

    ``shares`` ascend, up to 1.
    """

    trace: str
    experts: int  # of a block
    top_k: int
    shares: tuple[float, ...]
    hit_ratios: tuple[float, ...]

    def at(self, share: float) -> float:
        """Return the interpolated hit ratio for a ``share`` of cached experts; it is 0 for a share of 0."""
        return 1.0 if share >= 1 else float(np.interp(share, (0.0, *self.shares), (0.0, *self.hit_ratios)))

    def distance(self, experts: int, top_k: int) -> float:
        """Return how much the curve's blocks differ from blocks with other numbers of experts and top-k.

        A factor of two in ``experts`` or in ``top_k`` adds 1.
        """
        return abs(math.log2(experts / self.experts)) + abs(math.log2(top_k / self.top_k))


@cache
def hit_curves() -> tuple[HitCurve, ...]:
    """Return the bundled curves, which are read once."""
    curves = json.loads((files(__package__) / FILE).read_text())
    return tuple(
        HitCurve(c["trace"], c["experts"], c["top_k"], tuple(c["shares"]), tuple(c["hit_ratios"]))
        for c in curves["curves"]
    )


def nearest_curve(experts: int, top_k: int) -> HitCurve:
    """Return the curve whose blocks are most like blocks of ``experts`` experts, ``top_k`` of which each token uses."""
    return min(hit_curves(), key=lambda curve: curve.distance(experts, top_k))


# Cost of everything except products and reads. The unit is one operation of torch on a few numbers, called from Python,
# which ``speeds.py`` times. The numbers are fitted to measurements of ``tests/measurements/plan.py``.
STEP_OPERATIONS = 500.0  # for a token: embedding, masks, the head
LAYER_OPERATIONS = 100.0  # for a layer, which compiled code computes in two calls
MISS_OPERATIONS = 200.0  # for each record that is read: threads wait for each other
PASSING_OPERATIONS = 1000.0  # the same if a prompt needs more experts than a block has slots: little is read ahead
PROMPT_LAYER_OPERATIONS, PROMPT_EXPERT_OPERATIONS = 4000.0, 430.0  # in a prompt, whose tokens are sorted by expert
CONTEXT_TOKENS = 4096  # tokens of context, or all of a shorter one, for which the speed of decoding is estimated
PROMPT_TOKENS = 512  # length of the prompt whose rate is estimated
LONG_PROMPTS = (1000, 8000, 32_000)  # tokens of further prompts, whose seconds and reads are estimated
MEMORY_BOUND = 0.6  # if reading memory takes more than this share of the time without the disk, it is the limit


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a step, or of a prompt."""

    disk: float
    kernels: float
    overhead: float
    memory: float  # seconds to read the bytes that kernels read, at the memory's rate
    overlaps: bool  # whether reads from the disk overlap with the rest

    @property
    def seconds(self) -> float:
        """Total seconds. If reads overlap with computing, only the longer of the two counts."""
        computing = self.kernels + self.overhead
        return max(self.disk, computing) if self.overlaps else self.disk + computing

    @property
    def by(self) -> str:
        """Part that takes most of the time: "disk", "memory" or "compute"."""
        computing = self.kernels + self.overhead
        if self.disk > computing:
            return "disk"
        return "memory" if self.memory > MEMORY_BOUND * computing else "compute"

    def to_json(self) -> dict[str, Any]:
        """Return the parts, ``seconds`` and ``by`` as JSON."""
        return asdict(self) | {"seconds": self.seconds, "by": self.by}


@dataclass(frozen=True, slots=True)
class Caching:
    """Estimated hit ratio of each block with the slots that it gets."""

    slots: tuple[float, ...]  # of each block; 0 for a block that shares its slots with others
    hit_ratios: tuple[float, ...]
    curve: str  # the trace from which they are estimated

    @classmethod
    def of(cls, manifest: Manifest, slots: Mapping[str, int]) -> Caching:
        """Estimate hit ratios from the host tier's slots, which are divided among blocks as the host tier does.

        ``slots``: number of slots for each zarr array of the store.
        """
        own = [0.0] * len(manifest.blocks)
        for partition in all_partitions(manifest, slots):
            if len(partition.blocks) == 1:
                own[partition.blocks[0]] = partition.quota
        curves = [nearest_curve(block.experts, block.top_k) for block in manifest.blocks]
        ratios = [
            curve.at(count / block.experts) if count else 0.0
            for curve, count, block in zip(curves, own, manifest.blocks, strict=True)
        ]
        return cls(tuple(own), tuple(ratios), curves[0].trace)

    def mean(self, manifest: Manifest) -> float:
        """Return the mean hit ratio over the lookups of a token."""
        used = [block.top_k for block in manifest.blocks]
        return sum(k * hit for k, hit in zip(used, self.hit_ratios, strict=True)) / sum(used)


def token_cost(choice: Choice, caching: Caching, rates: MachineRates, cache_bytes: int) -> tuple[Cost, float]:
    """Return the cost of decoding a token, and the bytes that it reads from the disk.

    ``cache_bytes``: size of the keys and values that it attends to.
    """
    missing = misses = experts = disk = 0.0
    for number, block in enumerate(choice.manifest.blocks):
        layout = choice.manifest.layout(number)
        absent = block.top_k * (1 - caching.hit_ratios[number])
        pieces = -(-layout.slot_bytes // READ_PIECE_BYTES)
        misses += absent
        missing += absent * layout.slot_bytes
        disk += absent * layout.slot_bytes / rates.disk.at(absent * pieces)
        experts += block.top_k * layout.payload_bytes
    operations = STEP_OPERATIONS + LAYER_OPERATIONS * choice.layers + MISS_OPERATIONS * misses
    trunk_bytes, trunk_seconds = _trunk_cost(choice, rates, 1)
    return Cost(
        disk=disk,
        kernels=rates.seconds(experts, choice.bits, 1) + trunk_seconds + cache_bytes / rates.memory,
        overhead=operations * rates.operation,
        memory=(experts + trunk_bytes + cache_bytes) / rates.memory,
        overlaps=False,
    ), missing


def prompt_cost(choice: Choice, caching: Caching, rates: MachineRates, tokens: int = PROMPT_TOKENS) -> Cost:
    """Return the cost of a process's first prompt, without attention.

    No record is cached, and all tokens are computed together. They are assumed to choose experts evenly.
    """
    trunk_bytes, kernels = _trunk_cost(choice, rates, tokens)
    disk, memory = 0.0, trunk_bytes / rates.memory
    overhead = (STEP_OPERATIONS + PROMPT_LAYER_OPERATIONS * choice.layers) * rates.operation
    for number, block in enumerate(choice.manifest.blocks):
        layout = choice.manifest.layout(number)
        used = block.experts * (1 - (1 - block.top_k / block.experts) ** tokens)
        disk += used * layout.slot_bytes / rates.disk.all
        kernels += rates.seconds(used * layout.payload_bytes, choice.bits, tokens * block.top_k / used)
        miss = PASSING_OPERATIONS if used > caching.slots[number] else MISS_OPERATIONS
        overhead += (PROMPT_EXPERT_OPERATIONS + miss) * used * rates.operation
        memory += used * layout.payload_bytes / rates.memory
    return Cost(disk, kernels, overhead, memory, overlaps=True)


def long_prompts(
    model: Any, fit: Fit, caching: Caching, rates: MachineRates, lengths: Iterable[int] = LONG_PROMPTS
) -> list[dict[str, Any]]:
    """Return the seconds and the bytes read for a process's first prompt of each of ``lengths``, as JSON.

    Those that do not fit into the context are left out. ``model``: on the meta device.
    """
    choice, prefill = fit.choice, fit.needs.prefill
    together = prefill.lockstep_chunk or prefill.tokens
    layers = model.config.get_text_config(decoder=True).per_layer_config
    heads = [
        layer.num_attention_heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
        for layer in layers
    ]
    prompts = []
    for tokens in (tokens for tokens in lengths if tokens <= fit.needs.kv.context):
        passes = -(-tokens // together)
        cost = prompt_cost(choice, caching, rates, -(-tokens // passes))
        # scores and sums of values: each token attends to half of the others on average
        attention = sum(2 * width * tokens**2 / 2 * 2 for width in heads) / rates.many_rows[16]
        cost = replace(
            cost, disk=passes * cost.disk, kernels=passes * cost.kernels + attention, overhead=passes * cost.overhead
        )
        read = cost.disk * rates.disk.all
        prompts.append(
            {"tokens": tokens, "seconds": cost.seconds, "read_bytes": read, "together": min(tokens, together)}
        )
    return prompts


def _trunk_cost(choice: Choice, rates: MachineRates, tokens: float) -> tuple[int, float]:
    """Return the bytes of the trunk's matrices, and the seconds of their products with ``tokens`` tokens."""
    plain, records = choice.plain_bytes, sum(layout.payload_bytes for layout in choice.matrices)
    seconds = max(plain / rates.plain, plain * tokens / rates.many_rows[16])
    if records:
        seconds += rates.seconds(records, choice.trunk_bits, tokens)
    return plain + records, seconds


def estimate(
    model_choices: ModelChoices,
    fits: Sequence[Fit],
    best: Fit,
    resources: MachineResources,
    speeds: Speeds,
    *,
    options: Sequence[str],
    parallel: int = 1,
    pulls: bool = False,
    named: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the estimates as the JSON object that ``moetier plan --json`` prints.

    Args:
        fits: the choices to estimate, each with its slots and bytes on this machine (see ``Fit``).
        best: the one of ``fits`` that is recommended.
        options: options of `moetier chat` and `moetier serve` to recommend, as words of a command line.
        parallel: most requests that `moetier serve` computes together.
        pulls: whether to recommend `moetier pull`, not `moetier convert`.
        named: what names a model in an object store, as words of a command line.
    """
    manifest, headers = best.choice.manifest, model_choices.headers
    return {
        "model": model_choices.name,
        "source": model_choices.source,
        "converted": headers is None,
        "source_bytes": model_choices.source_bytes if headers is not None else None,
        "to_download": headers is not None and headers.on_hub,
        "names_code": headers is not None and headers.names_code,
        "quantised_with": model_choices.quantised_with,
        "perhaps_native": model_choices.perhaps_native,
        "shapes": "converted" if headers is None else "headers" if headers.shaped else "the index, and the model",
        "blocks": len(manifest.blocks),
        "experts": max(block.experts for block in manifest.blocks),
        "top_k": max(block.top_k for block in manifest.blocks),
        "records": manifest.record_count,
        "context": best.needs.kv.context,
        "parallel": parallel,
        "prompt_tokens": PROMPT_TOKENS,
        "machine": _machine(resources, speeds),
        "choices": [choice_entry(model_choices, fit, resources, speeds) for fit in fits],
        "recommended": _recommended(model_choices, best, options, parallel, None if pulls else resources.into, named),
        "without_ram": None,
    }


def _machine(resources: MachineResources, speeds: Speeds) -> dict[str, Any]:
    return {
        "memory_bytes": resources.host.bytes,
        "memory_limiter": resources.host.limiter,
        "idle_bytes": resources.idle_bytes,
        "device": str(resources.device.torch_device),
        "device_bytes": resources.on_device.bytes if resources.on_device else None,
        "disk_folder": str(resources.into.resolve()),
        "disk_free_bytes": resources.disk_free,
        "disk_by": speeds.disk_by,
        "workers": speeds.workers,
        "cpus_of_others": speeds.others,
        "disk": asdict(speeds.disk),
        "rates": asdict(speeds.rates) if speeds.rates else None,
        "quantising_weights_per_s": dict(speeds.quantising),
    }


def choice_entry(model_choices: ModelChoices, fit: Fit, resources: MachineResources, speeds: Speeds) -> dict[str, Any]:
    """Return the estimates for one choice, as an entry of ``choices``."""
    choice = fit.choice
    entry: dict[str, Any] = {
        "bits": choice.bits,
        "trunk_bits": choice.trunk_bits,
        "as_it_is": choice.as_it_is,
        "native": choice.native,
        "disk_bytes": choice.disk_bytes,
        "experts_bytes": choice.manifest.stored_bytes,
        "trunk_bytes": choice.trunk_bytes,
        "convert_s": _conversion(model_choices, choice, speeds) if fit.works else None,
        "works": fit.works,
        "problem": as_options(fit.problem.cause) if fit.problem else None,
    }
    if not fit.works:
        return entry
    caching = Caching.of(choice.manifest, fit.slots)
    entry |= {
        "slots": fit.slot_count,
        "device_slots": None if fit.device_slots is None else sum(fit.device_slots.values()),
        "all_resident": fit.all_resident,
        "streams": fit.streams,
        "prefill_chunk": min(fit.needs.prefill.lockstep_chunk or fit.needs.prefill.tokens, fit.needs.kv.context),
        "hit_ratio": caching.mean(choice.manifest),
        "hit_curve": caching.curve,
        "memory": memory_of(fit, resources),
        "decode": None,
        "prefill": None,
        "prompts": [],
    }
    if speeds.rates is not None:
        kv = fit.needs.kv
        nbytes = min(kv.nbytes, kv.page_bytes * -(-CONTEXT_TOKENS // PAGE_TOKENS))
        token, read = token_cost(choice, caching, speeds.rates, nbytes)
        last, _ = token_cost(choice, caching, speeds.rates, kv.page_bytes * -(-kv.context // PAGE_TOKENS))
        prompt = prompt_cost(choice, caching, speeds.rates)
        entry["decode"] = {
            "tokens_per_s": 1 / token.seconds,
            "tokens_per_s_at_the_end": 1 / last.seconds,
            "read_bytes_per_token": read,
            **token.to_json(),
        }
        entry["prefill"] = {"tokens_per_s": PROMPT_TOKENS / prompt.seconds, **prompt.to_json()}
        entry["prompts"] = long_prompts(model_choices.model, fit, caching, speeds.rates)
    entry["cards"] = by_data_sheet(
        choice, fit.needs.kv.nbytes, lambda slots: Caching.of(choice.manifest, slots).hit_ratios
    )
    return entry


def _conversion(model_choices: ModelChoices, choice: Choice, speeds: Speeds) -> float | None:
    """Estimate the seconds of a conversion, without the download. Return None if nothing is converted.

    A conversion takes as long as reading and then writing all bytes, or as long as quantising if that is longer.
    """
    if model_choices.headers is None or choice.as_it_is:
        return None
    moved = (model_choices.source_bytes + choice.disk_bytes) / speeds.disk.all
    experts = sum(
        block.experts * choice.manifest.layout(number).weights for number, block in enumerate(choice.manifest.blocks)
    )
    trunk = sum(layout.weights for layout in choice.matrices)
    quantised = sum(
        weights / (speeds.quantising[bits] * speeds.workers)
        for weights, bits in ((experts, 16 if choice.native else choice.bits), (trunk, choice.trunk_bits))
        if bits != 16
    )
    return max(moved, quantised)


def _recommended(
    model_choices: ModelChoices, best: Fit, options: Sequence[str], parallel: int, into: Path | None, by: Sequence[str]
) -> dict[str, Any]:
    """Return the recommended bits, and command lines to make and to run the model.

    ``parallel``: most requests that `moetier serve` computes together; ``into``: the folder for `moetier convert`; None
    to recommend `moetier pull`; ``by``: ``named`` of ``estimate``.
    """
    headers, choice = model_choices.headers, best.choice
    directory = (headers is None and listed_name(Path(model_choices.source))) or model_choices.source
    pull = convert = None
    if headers is not None and not choice.as_it_is:
        source, code = shlex.quote(model_choices.source), " --ignore-code" if headers.names_code else ""
        if into is None:
            tag = tag_of("native" if choice.native else choice.bits, choice.trunk_bits)
            directory = f"{model_choices.source}:{tag}"
            pull = f"moetier pull {source} {choice.options}{code}"
        else:
            stem = model_choices.name.rpartition("/")[2]
            directory = str(into / (f"{stem}-native" if choice.native else f"{stem}-{choice.bits}bit"))
            convert = f"moetier convert {source} {shlex.quote(directory)} {choice.options}{code}"
    return {
        "bits": choice.bits,
        "trunk_bits": choice.trunk_bits,
        "native": choice.native,
        "pull": pull,
        "convert": convert,
        "chat": shlex.join(["moetier", "chat", *(by or [directory]), *options]),
        "serve": shlex.join(["moetier", "serve", *(by or [directory]), *options, "--parallel", str(parallel)]),
    }
