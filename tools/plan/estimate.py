"""Estimate of every choice: sizes, tiers, speed and time, as a value and as text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.config import format_bytes
from moetier.runtime.pulled import tag_of
from moetier.tiers.host.tier import LOADERS
from moetier.tiers.layout import Bits, RecordLayout
from moetier.tiers.store.checksum import PIECE_BYTES
from moetier.tiers.store.reader import ExpertStore
from moetier.tools.bench.disk import RandomReads
from moetier.tools.cli.failure import as_options, plain
from moetier.tools.cli.report import table

from . import probes
from .choices import Choice, ModelChoices
from .cost import PROMPT_TOKENS, Caching, DiskRate, Rates, prompt_cost, token_cost
from .fit import Fit, Room, memory_of

GB = 1e9


@dataclass(frozen=True)
class Speeds:
    """Rates of this machine; ``rates`` is None on a GPU, where no speed is estimated."""

    disk: DiskRate
    disk_by: str
    rates: Rates | None
    quantising: Mapping[Bits, float]  # weights a second of a worker, by bits
    workers: int

    @classmethod
    def measure(
        cls, model_choices: ModelChoices, choices: Sequence[Choice], room: Room, disk: float | None, workers: int
    ) -> Speeds:
        """Measure for a few seconds; ``disk`` is its rate in GB/s, where it is known."""
        if disk is None:
            rate, by = _probed_disk(model_choices, choices, room)
        else:
            rate, by = DiskRate(disk * GB, disk * GB, LOADERS), "given"
        rates = None
        if room.device.type == "cpu":
            size = probes.buffer_bytes(room.host.bytes)
            memory = probes.memory_rate(size)
            one, many = probes.kernel_rates(_layouts(choices), size)
            rates = Rates(rate, memory, one, many, probes.plain_rate(memory, size), probes.operation_seconds())
        made = choices if model_choices.headers is not None else ()
        widths = {bits for choice in made for bits in (choice.bits, choice.trunk_bits)} - {16}
        quantising = probes.quantising_rates(sorted(widths))
        return cls(rate, by, rates, quantising, workers)


def _layouts(choices: Sequence[Choice]) -> dict[Bits, RecordLayout]:
    """Return a layout of each width that experts or trunk are multiplied with, of the experts' matrices."""
    expert = next(iter(choices[0].manifest.layouts.values()))
    widths: set[Bits] = {16, *(choice.bits for choice in choices), *(choice.trunk_bits for choice in choices)}
    return {bits: probes.probe_layout(expert, bits) for bits in sorted(widths)}


def _probed_disk(model_choices: ModelChoices, choices: Sequence[Choice], room: Room) -> tuple[DiskRate, str]:
    """Measure reads of records, else of the checkpoint's files on the same disk, else of a file made for it."""
    (some, *_) = choices
    block = min(max(layout.slot_bytes for layout in some.manifest.layouts.values()), PIECE_BYTES)
    with ExitStack() as stack:
        if model_choices.headers is None:
            with ExpertStore.open(Path(model_choices.source)) as store:
                reads, what = RandomReads.of_records(Path(model_choices.source), direct=store.direct), "its records"
        elif files := _files_on(room.into, model_choices):
            reads, what = RandomReads.of_files(files, block), "the checkpoint's files"
        else:
            largest = max(choice.disk_bytes for choice in choices)
            reads, what = stack.enter_context(probes.reads_at(room.into, block, largest)), "a file made for it"
        return probes.disk_rate(reads), f"{reads.by}, on {what}"


def _files_on(folder: Path, model_choices: ModelChoices) -> list[Path]:
    """Return the checkpoint's files that are on the disk of ``folder``."""
    assert model_choices.headers is not None
    files = {tensor.file for tensor in model_choices.headers.checkpoint.tensors.values()}
    there = [file for file in sorted(files) if file.is_file() and file.stat().st_dev == folder.stat().st_dev]
    return [file for file in there if file.stat().st_size >= probes.LEAST_FILE_BYTES]


def estimate(
    model_choices: ModelChoices,
    fits: Sequence[Fit],
    best: Fit,
    room: Room,
    speeds: Speeds,
    *,
    context: int,
    options: Mapping[str, str | int | None],
    pulls: bool = False,
) -> dict[str, Any]:
    """Return what ``moetier plan --json`` prints.

    ``options``: the given options that `generate` takes too, by name. ``pulls``: the model is to be pulled, and kept by
    its name.
    """
    manifest, headers = best.choice.manifest, model_choices.headers
    return {
        "model": model_choices.name,
        "source": model_choices.source,
        "converted": headers is None,
        "source_bytes": model_choices.source_bytes if headers is not None else None,
        "to_download": headers is not None and headers.on_hub,
        "names_code": headers is not None and headers.names_code,
        "shapes": "converted" if headers is None else "headers" if headers.shaped else "the index, and the model",
        "blocks": len(manifest.blocks),
        "experts": max(block.experts for block in manifest.blocks),
        "top_k": max(block.top_k for block in manifest.blocks),
        "records": manifest.record_count,
        "context": context,
        "prompt_tokens": PROMPT_TOKENS,
        "machine": _machine(room, speeds),
        "choices": [_choice(model_choices, fit, room, speeds) for fit in fits],
        "recommended": _recommended(model_choices, best, context, options, None if pulls else room.into),
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


def _choice(model_choices: ModelChoices, fit: Fit, room: Room, speeds: Speeds) -> dict[str, Any]:
    choice = fit.choice
    found: dict[str, Any] = {
        "bits": choice.bits,
        "trunk_bits": choice.trunk_bits,
        "disk_bytes": choice.disk_bytes,
        "experts_bytes": choice.manifest.stored_bytes,
        "trunk_bytes": choice.trunk_bytes,
        "convert_s": _conversion(model_choices, choice, speeds) if fit.works else None,
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


def _conversion(model_choices: ModelChoices, choice: Choice, speeds: Speeds) -> float | None:
    """Return the seconds of a conversion, without the download.

    Reading and writing at the disk's rate, one after the other; or quantising, where that is slower.
    """
    if model_choices.headers is None:
        return None
    moved = (model_choices.source_bytes + choice.disk_bytes) / speeds.disk.all
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
    model_choices: ModelChoices, best: Fit, context: int, options: Mapping[str, str | int | None], into: Path | None
) -> dict[str, Any]:
    """Return widths and command lines: `pull` where ``into`` is None, else `convert`."""
    headers, choice, directory = model_choices.headers, best.choice, model_choices.source
    pull = convert = None
    if headers is not None:
        source, code = shlex.quote(model_choices.source), " --ignore-code" if headers.names_code else ""
        if into is None:
            directory = f"{model_choices.source}:{tag_of(choice.bits, choice.trunk_bits)}"
            pull = f"moetier pull {source} {choice.options}{code}"
        else:
            directory = str(into / f"{model_choices.name.rpartition('/')[2]}-{choice.bits}bit")
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


HEAD = [
    *("experts", "trunk", "on disk", "convert", "in RAM", "hits", "read"),
    *("tokens/s", "limited by", "prompt/s", "limited by"),
]


def text(found: dict[str, Any]) -> str:
    """Return a plan as text: what is given, a table of the choices, and what to do."""
    recommended = found["recommended"]
    best = _of(found, recommended["bits"], recommended["trunk_bits"])
    lines = [*_heading(found, best), "", table([HEAD, *(_row(found, choice) for choice in _shown(found, best))]), ""]
    lines += _sentences(found, best)
    return "\n".join(line.rstrip() for line in lines)


def _of(found: dict[str, Any], bits: int, trunk_bits: int) -> dict[str, Any]:
    return next(c for c in found["choices"] if (c["bits"], c["trunk_bits"]) == (bits, trunk_bits))


def _shown(found: dict[str, Any], best: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choice of each width of experts that has the recommended trunk, where it was asked for."""
    same = [choice for choice in found["choices"] if choice["trunk_bits"] == best["trunk_bits"]]
    return sorted(same, key=lambda choice: -choice["bits"])


def _heading(found: dict[str, Any], best: dict[str, Any]) -> list[str]:
    machine, memory = found["machine"], best["memory"]
    size = "" if found["source_bytes"] is None else f"{format_bytes(found['source_bytes'])}, "
    to_come = " (to be downloaded)" if found["to_download"] else ""
    device = "no GPU" if machine["device"] == "cpu" else f"{machine['device']} {format_bytes(machine['device_bytes'])}"
    trunks = {choice["trunk_bits"]: choice["trunk_bytes"] for choice in found["choices"]}
    sizes = ", ".join(f"{format_bytes(size)} at {bits} bits" for bits, size in trunks.items())
    disk = machine["disk"]["all"] / 1e9
    return [
        f"model    {plain(found['model'])}: {size}{found['blocks']} blocks of {found['experts']} experts, top-"
        f"{found['top_k']}{to_come}",
        f"machine  {format_bytes(machine['memory_bytes'])} of memory free ({machine['memory_limiter']}), {device}, "
        f"{machine['workers']} CPUs",
        f"disk     {format_bytes(machine['disk_free_bytes'])} free, {disk:.2f} GB/s ({machine['disk_by']})",
        f"trunk    {sizes}",
        f"context  {found['context']} tokens: {format_bytes(memory['kv_cache_bytes'])} of keys and values",
    ]


def _row(found: dict[str, Any], choice: dict[str, Any]) -> list[str]:
    convert = "-" if choice["convert_s"] is None else _time(choice["convert_s"])
    head = [f"{choice['bits']} bits", str(choice["trunk_bits"]), format_bytes(choice["disk_bytes"]), convert]
    if not choice["works"]:
        return [*head, "no", "-", "-", "-", "-", "-", "-"]
    share = f"{choice['slots'] / found['records']:.0%}"
    row = [*head, share if choice["slots"] < found["records"] else "all", f"{choice['hit_ratio']:.0%}"]
    decode, prefill = choice["decode"], choice["prefill"]
    if decode is None:
        return [*row, "-", "-", "-", "-", "-"]
    row += [format_bytes(round(decode["read_bytes_per_token"])), _rate(decode["tokens_per_s"]), decode["by"]]
    return [*row, _rate(prefill["tokens_per_s"]), prefill["by"]]


def _sentences(found: dict[str, Any], best: dict[str, Any]) -> list[str]:
    recommended, memory = found["recommended"], best["memory"]
    count, bits, trunk_bits = found["records"], best["bits"], best["trunk_bits"]
    what = "It runs" if found["converted"] else f"With experts of {bits} bits and a trunk of {trunk_bits} it runs"
    lines = [
        f"{what}: {best['slots']:,} of {count:,} experts in memory, {format_bytes(memory['process_bytes'])} in all."
    ]
    if best["device_slots"] is not None:
        lines.append(f"{best['device_slots']:,} of them fit the GPU, where speed is not forecast.")
    else:
        lines.append(f"Hits are an estimate, from the trace {best['hit_curve']}; rates are those of this moment.")
    lines += _caching(found, best)
    return lines + [command for name in ("pull", "convert", "generate") if (command := recommended[name])]


def _caching(found: dict[str, Any], best: dict[str, Any]) -> list[str]:
    """Say where caching does not help."""
    if best["all_resident"]:
        return ["Everything stays in memory once it was read: caching is not needed, nor more memory."]
    if best["streams"]:
        wanted = found["blocks"] * found["top_k"]
        return [
            f"Caching hardly helps: {best['slots']:,} slots are fewer than the {wanted:,} experts of one token, so "
            "that most are read again for each."
        ]
    return []


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rate(tokens: float) -> str:
    return f"{tokens:.2f}" if tokens < 1 else f"{tokens:.1f}" if tokens < 10 else f"{tokens:.0f}"
