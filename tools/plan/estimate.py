"""A plan as a value: every choice with its sizes, tiers, speed and time, and the one that is recommended."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.pulled import tag_of
from moetier.tiers.host.tier import LOADERS
from moetier.tiers.layout import Bits, RecordLayout
from moetier.tiers.store.reader import PIECE_BYTES, ExpertStore
from moetier.tools.bench.disk_rate import RandomReads
from moetier.tools.cli.plain import as_options

from . import probes
from .choices import Choice, Prospect
from .fit import Fit, Room, memory_of
from .forecast import PROMPT_TOKENS, Caching, DiskRate, Rates, prompt_cost, token_cost

GB = 1e9


@dataclass(frozen=True)
class Speeds:
    """``rates`` is None on a GPU, where nothing is forecast."""

    disk: DiskRate
    disk_by: str
    rates: Rates | None
    quantising: Mapping[Bits, float]  # weights a second of a worker, by bits
    workers: int

    @classmethod
    def measure(
        cls, prospect: Prospect, choices: Sequence[Choice], room: Room, disk: float | None, workers: int
    ) -> Speeds:
        """A few seconds; ``disk`` is its rate in GB/s, where it is known."""
        if disk is None:
            rate, by = _probed_disk(prospect, choices, room)
        else:
            rate, by = DiskRate(disk * GB, disk * GB, LOADERS), "given"
        rates = None
        if room.device.type == "cpu":
            size = probes.buffer_bytes(room.host.bytes)
            memory = probes.memory_rate(size)
            one, many = probes.kernel_rates(_layouts(choices), size)
            rates = Rates(rate, memory, one, many, probes.plain_rate(memory, size), probes.operation_seconds())
        made = choices if prospect.outline is not None else ()
        widths = {bits for choice in made for bits in (choice.bits, choice.trunk_bits)} - {16}
        quantising = probes.quantising_rates(sorted(widths))
        return cls(rate, by, rates, quantising, workers)


def _layouts(choices: Sequence[Choice]) -> dict[Bits, RecordLayout]:
    """Of each width that experts or trunk are multiplied with, made of the experts' matrices."""
    expert = next(iter(choices[0].manifest.layouts.values()))
    widths: set[Bits] = {16, *(choice.bits for choice in choices), *(choice.trunk_bits for choice in choices)}
    return {bits: probes.probe_layout(expert, bits) for bits in sorted(widths)}


def _probed_disk(prospect: Prospect, choices: Sequence[Choice], room: Room) -> tuple[DiskRate, str]:
    """Of records, or of the checkpoint's files on the same disk, or of a file that is made for it."""
    (some, *_) = choices
    block = min(max(layout.slot_bytes for layout in some.manifest.layouts.values()), PIECE_BYTES)
    with ExitStack() as stack:
        if prospect.outline is None:
            with ExpertStore.open(Path(prospect.source)) as store:
                reads, what = RandomReads.of_records(Path(prospect.source), direct=store.direct), "its records"
        elif files := _files_on(room.into, prospect):
            reads, what = RandomReads.of_files(files, block), "the checkpoint's files"
        else:
            largest = max(choice.disk_bytes for choice in choices)
            reads, what = stack.enter_context(probes.reads_at(room.into, block, largest)), "a file made for it"
        return probes.disk_rate(reads), f"{reads.by}, on {what}"


def _files_on(folder: Path, prospect: Prospect) -> list[Path]:
    """The checkpoint's, where they are there and on the disk of ``folder``."""
    assert prospect.outline is not None
    files = {tensor.file for tensor in prospect.outline.checkpoint.tensors.values()}
    there = [file for file in sorted(files) if file.is_file() and file.stat().st_dev == folder.stat().st_dev]
    return [file for file in there if file.stat().st_size >= probes.LEAST_FILE_BYTES]


def estimate(
    prospect: Prospect,
    fits: Sequence[Fit],
    best: Fit,
    room: Room,
    speeds: Speeds,
    *,
    context: int,
    options: Mapping[str, str | int | None],
    pulls: bool = False,
) -> dict[str, Any]:
    """What ``moetier plan --json`` prints. ``options``: what was given that `generate` takes, by option. ``pulls``: it
    is to be pulled, and kept by its name."""
    manifest, outline = best.choice.manifest, prospect.outline
    return {
        "model": prospect.name,
        "source": prospect.source,
        "converted": outline is None,
        "source_bytes": prospect.source_bytes if outline is not None else None,
        "to_download": outline is not None and outline.on_hub,
        "names_code": outline is not None and outline.names_code,
        "shapes": "converted" if outline is None else "headers" if outline.shaped else "the index, and the model",
        "blocks": len(manifest.blocks),
        "experts": max(block.experts for block in manifest.blocks),
        "top_k": max(block.top_k for block in manifest.blocks),
        "records": manifest.record_count,
        "context": context,
        "prompt_tokens": PROMPT_TOKENS,
        "machine": _machine(room, speeds),
        "choices": [_choice(prospect, fit, room, speeds) for fit in fits],
        "recommended": _recommended(prospect, best, context, options, None if pulls else room.into),
    }


def _machine(room: Room, speeds: Speeds) -> dict[str, Any]:
    return {
        "memory_bytes": room.host.bytes,
        "memory_limiter": room.host.limiter,
        "idle_bytes": room.idle_bytes,
        "device": str(room.device),
        "device_bytes": room.on_device.bytes if room.on_device else None,
        "disk_folder": str(room.into.resolve()),
        "disk_free_bytes": room.disk_free,
        "disk_by": speeds.disk_by,
        "workers": speeds.workers,
        "disk": asdict(speeds.disk),
        "rates": asdict(speeds.rates) if speeds.rates else None,
        "quantising_weights_per_s": dict(speeds.quantising),
    }


def _choice(prospect: Prospect, fit: Fit, room: Room, speeds: Speeds) -> dict[str, Any]:
    choice = fit.choice
    found: dict[str, Any] = {
        "bits": choice.bits,
        "trunk_bits": choice.trunk_bits,
        "disk_bytes": choice.disk_bytes,
        "experts_bytes": choice.manifest.stored_bytes,
        "trunk_bytes": choice.trunk_bytes,
        "convert_s": _conversion(prospect, choice, speeds) if fit.works else None,
        "works": fit.works,
        "problem": as_options(fit.problem.cause) if fit.problem else None,
    }
    if not fit.works:
        return found
    caching = Caching.of(choice.manifest, fit.slots)
    found |= {
        "slots": fit.slot_count,
        "device_slots": None if fit.device_slots is None else sum(fit.device_slots.values()),
        "all_resident": fit.all_resident,
        "streams": fit.streams,
        "hit_ratio": caching.mean(choice.manifest),
        "hit_curve": caching.curve,
        "memory": memory_of(fit, room),
        "decode": None,
        "prefill": None,
    }
    if speeds.rates is not None:
        token, read = token_cost(choice.manifest, choice.bits, caching, choice.trunk, speeds.rates, fit.kv_bytes)
        prompt = prompt_cost(choice.manifest, choice.bits, caching, choice.trunk, speeds.rates)
        found["decode"] = {"tokens_per_s": 1 / token.seconds, "read_bytes_per_token": read, **token.to_json()}
        found["prefill"] = {"tokens_per_s": PROMPT_TOKENS / prompt.seconds, **prompt.to_json()}
    return found


def _conversion(prospect: Prospect, choice: Choice, speeds: Speeds) -> float | None:
    """Seconds: what is read and written at the disk's rate, one after the other; or quantised, where that is slower.
    The download is not in it."""
    if prospect.outline is None:
        return None
    moved = (prospect.source_bytes + choice.disk_bytes) / speeds.disk.all
    experts = sum(
        block.experts * choice.manifest.layout(number).weights for number, block in enumerate(choice.manifest.blocks)
    )
    trunk = sum(layout.weights for layout in choice.matrices)
    quantised = sum(
        weights / (speeds.quantising[bits] * speeds.workers)
        for weights, bits in ((experts, choice.bits), (trunk, choice.trunk_bits))
        if bits != 16
    )
    return max(moved, quantised)


def _recommended(
    prospect: Prospect, best: Fit, context: int, options: Mapping[str, str | int | None], into: Path | None
) -> dict[str, Any]:
    """Widths, and command lines: of `pull`, where ``into`` is None, and `convert` what is to be run, else None."""
    outline, choice, directory = prospect.outline, best.choice, prospect.source
    pull = convert = None
    if outline is not None:
        source, code = shlex.quote(prospect.source), " --ignore-code" if outline.names_code else ""
        if into is None:
            directory = f"{prospect.source}:{tag_of(choice.bits, choice.trunk_bits)}"
            pull = f"moetier pull {source} {choice.options}{code}"
        else:
            directory = str(into / f"{prospect.name.rpartition('/')[2]}-{choice.bits}bit")
            convert = f"moetier convert {source} {shlex.quote(directory)} {choice.options}{code}"
    given = [f"{option} {shlex.quote(str(size))}" for option, size in options.items() if size is not None]
    words = ["moetier generate", shlex.quote(directory), *given, f"--context {context}", "'Once upon a time'"]
    return {
        "bits": choice.bits,
        "trunk_bits": choice.trunk_bits,
        "pull": pull,
        "convert": convert,
        "generate": " ".join(words),
    }
