"""A plan for people: a table, and what follows from it in two or three sentences."""

from __future__ import annotations

from typing import Any

from moetier.runtime.config import format_bytes
from moetier.tools.cli.plain import plain
from moetier.tools.cli.report import table

HEAD = [
    *("experts", "trunk", "on disk", "convert", "in RAM", "hits", "read"),
    *("tokens/s", "limited by", "prompt/s", "limited by"),
]


def text(found: dict[str, Any]) -> str:
    recommended = found["recommended"]
    best = _of(found, recommended["bits"], recommended["trunk_bits"])
    lines = [*_heading(found, best), "", table([HEAD, *(_row(found, choice) for choice in _shown(found, best))]), ""]
    lines += _sentences(found, best)
    return "\n".join(line.rstrip() for line in lines)


def _of(found: dict[str, Any], bits: int, trunk_bits: int) -> dict[str, Any]:
    return next(c for c in found["choices"] if (c["bits"], c["trunk_bits"]) == (bits, trunk_bits))


def _shown(found: dict[str, Any], best: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each width of the experts, that with the recommended one's trunk, where it was asked for."""
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
    """When it does not help."""
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
