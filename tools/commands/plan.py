"""``moetier plan SRC|DIR``: estimate whether a model runs here, and how fast, before it is downloaded or converted."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetier.runtime.config import CACHE, TIER_OPTIONS
from moetier.runtime.device_names import HOST
from moetier.tiers.layout import TRUNK_BITS
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import add_bits, add_option, add_prefill_argument, size
from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import add_json, source
from moetier.tools.cli.report import table
from moetier.tools.plan.forecast import PLANNED

EXAMPLES = (
    "moetier plan Qwen/Qwen3-30B-A3B",
    "moetier plan mistralai/Mixtral-8x7B-v0.1 --bits 4,3 --ram 12GiB",
    "moetier plan ./mixtral-4bit --memory 26GiB --disk 3.5",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier plan`."""
    parser.add_argument(
        "source",
        type=source,
        metavar="SRC",
        help="a checkpoint's folder, which needs only config.json and the index of its weights; the checkpoint's id on "
        "the Hugging Face hub (no weights are downloaded); a GGUF file; a model directory; a name that moetier list "
        "shows; or an address in an object store",
    )
    add_bits(parser, TRUNK_BITS)
    ram = replace(TIER_OPTIONS["ram"], help="host memory for experts (default: as much as generate would use)")
    for option in (ram, *(TIER_OPTIONS[name] for name in PLANNED[1:-1])):
        add_option(parser, option)
    add_prefill_argument(parser)
    parallel = "number of requests that serve computes together; they share the memory for keys and values"
    add_option(parser, replace(TIER_OPTIONS["sequences"], name="parallel", metavar="N", help=parallel))
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="plan for another machine, with so much free memory (default: this machine's); --disk is its disk's speed",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="folder whose disk is measured (default: the current folder; for an id on the hub, the folder into which "
        "moetier pull puts models). It must have room for the model; with --memory, only if --into is given",
    )
    parser.add_argument("--disk", type=float, metavar="GB/S", help="speed of the disk, instead of measuring it")
    add_json(parser)
    parser.set_defaults(outline=True)


def run(arguments: argparse.Namespace) -> None:
    """Print the plan. Raises MoetierError if no choice that was asked for can work."""
    from moetier.tools.plan.forecast import plan

    forecast = plan(
        arguments.source,
        bits=arguments.bits,
        trunk_bits=arguments.trunk_bits,
        into=arguments.into,
        disk=arguments.disk,
        memory=arguments.memory,
        parallel=arguments.parallel,
        cache=[(name, getattr(arguments, name)) for name in CACHE],
        say=_to_a_terminal,
        **{name: getattr(arguments, name) for name in PLANNED},
    )
    print(json.dumps(forecast, indent=2) if arguments.json else text(forecast))


def _to_a_terminal(line: str) -> None:
    if sys.stderr.isatty():
        print(f"plan: {line}", file=sys.stderr, flush=True)


SHOWN_CARDS = ("RTX 3060", "RTX 4090", "H100 80GB HBM3")  # of those in ``tools.plan.cards``
MIN_FOR_CARDS = 1 << 30  # bytes of a model on disk; overheads, which data sheets leave out, decide for smaller ones
HEAD = [
    *("experts", "trunk", "on disk", "convert", "in RAM", "hits", "read"),
    *("tokens/s", "limited by", "prompt/s", "limited by"),
]


def text(forecast: dict[str, Any]) -> str:
    """Return a plan as text: model and machine, a table of choices with the recommended trunk, and commands to run."""
    recommended = forecast["recommended"]
    same = [choice for choice in forecast["choices"] if choice["trunk_bits"] == recommended["trunk_bits"]]
    best = next(choice for choice in same if all(choice[key] == recommended[key] for key in ("bits", "native")))
    rows = [_row(forecast, choice) for choice in sorted(same, key=lambda choice: -choice["bits"])]
    lines = [*_heading(forecast, best), "", table([HEAD, *rows]), "", *_sentences(forecast, best, same)]
    return "\n".join(line.rstrip() for line in lines)


def _heading(forecast: dict[str, Any], best: dict[str, Any]) -> list[str]:
    machine, memory = forecast["machine"], best["memory"]
    size = "" if forecast["source_bytes"] is None else f"{format_bytes(forecast['source_bytes'])}, "
    to_come = " (to be downloaded)" if forecast["to_download"] else ""
    device = "no GPU" if machine["device"] == HOST else f"{machine['device']} {format_bytes(machine['device_bytes'])}"
    trunks = {choice["trunk_bits"]: choice["trunk_bytes"] for choice in forecast["choices"]}
    sizes = ", ".join(f"{format_bytes(size)} at {bits} bits" for bits, size in trunks.items())
    requests = f", shared by {forecast['parallel']} requests" if forecast["parallel"] > 1 else ""
    return [
        f"model    {plain(forecast['model'])}: {size}{forecast['blocks']} blocks of {forecast['experts']} experts, top-"
        f"{forecast['top_k']}{to_come}",
        f"machine  {format_bytes(machine['memory_bytes'])} of memory free ({machine['memory_limiter']}), {device}, "
        f"{machine['workers']} CPUs",
        f"disk     {_disk(machine)}",
        f"trunk    {sizes}",
        f"context  {forecast['context']} tokens: {format_bytes(memory['kv_cache_bytes'])} of keys and values{requests}"
        f"{_at_the_end(best)}; {best['prefill_chunk']} tokens of a prompt are computed together: "
        f"{format_bytes(memory['computing_bytes'])}",
        *_prompts(best["prompts"]),
        *_cold_start(forecast["cold_start"]),
    ]


def _disk(machine: dict[str, Any]) -> str:
    free, rate = machine["disk_free_bytes"], f"{machine['disk']['all'] / 1e9:.2f} GB/s ({machine['disk_by']})"
    if free is not None:
        return f"{format_bytes(free)} free, {rate}"
    return rate if machine["disk_by"] == "given" else f"{rate}, of this machine: --disk gives another's"


def _prompts(prompts: list[dict[str, Any]]) -> list[str]:
    parts = [
        f"{prompt['tokens']:,} tokens in {_time(prompt['seconds'])}, {format_bytes(round(prompt['read_bytes']))} read"
        for prompt in prompts
    ]
    return [f"prompts  {'; '.join(parts)}"] if parts else []


def _at_the_end(best: dict[str, Any]) -> str:
    """Return how fast a choice decodes at the end of a long context, which has more keys and values to read."""
    decode = best["decode"]
    if decode is None or decode["tokens_per_s_at_the_end"] > 0.99 * decode["tokens_per_s"]:
        return ""
    return f", {_rate(decode['tokens_per_s_at_the_end'])} tokens/s at the end, {_rate(decode['tokens_per_s'])} before"


def _cold_start(cold: dict[str, Any] | None) -> list[str]:
    if cold is None:
        return []
    parts = [
        f"{what} ({format_bytes(cold[f'{name}_bytes'])}) in {_time(cold[f'{name}_s'])}"
        for name, what in (("trunk", "the trunk"), ("experts", "all experts"))
        if cold[f"{name}_bytes"]
    ]
    return [f"cold     {plain(cold['address'])}, {cold['bytes_per_s'] / 1e6:.0f} MB/s: {', '.join(parts)}"]


def _row(forecast: dict[str, Any], choice: dict[str, Any]) -> list[str]:
    convert = "-" if choice["convert_s"] is None else _time(choice["convert_s"])
    head = [_name(choice), str(choice["trunk_bits"]), format_bytes(choice["disk_bytes"]), convert]
    if not choice["works"]:
        return [*head, "no", "-", "-", "-", "-", "-", "-"]
    share = f"{choice['slots'] / forecast['records']:.0%}"
    row = [*head, share if choice["slots"] < forecast["records"] else "all", f"{choice['hit_ratio']:.0%}"]
    decode, prefill = choice["decode"], choice["prefill"]
    if decode is None:
        return [*row, "-", "-", "-", "-", "-"]
    row += [format_bytes(round(decode["read_bytes_per_token"])), _rate(decode["tokens_per_s"]), decode["by"]]
    return [*row, _rate(prefill["tokens_per_s"]), prefill["by"]]


def _name(choice: dict[str, Any]) -> str:
    return f"{choice['bits']} bits" + (", native" if choice["native"] else "")


def _bad(same: list[dict[str, Any]]) -> list[str]:
    """Return a sentence that says which of the choices ``same`` can't be used, and why; none if all can."""
    bad = sorted(
        (choice for choice in same if not choice["works"]), key=lambda choice: (choice["bits"], choice["disk_bytes"])
    )
    if not bad:
        return []
    are_largest = all(choice["bits"] < bad[0]["bits"] for choice in same if choice["works"])
    names = f"{bad[0]['bits']} bits or more" if len(bad) > 1 and are_largest else " and ".join(map(_name, bad))
    return [f"{names} can't be used: {bad[0]['problem']}"]


def _sentences(forecast: dict[str, Any], best: dict[str, Any], same: list[dict[str, Any]]) -> list[str]:
    """Return what the table means, and the recommended commands. ``same``: the choices of the table."""
    from moetier.tools.rates.hardware import busy

    recommended, memory = forecast["recommended"], best["memory"]
    count, bits, trunk_bits = forecast["records"], best["bits"], best["trunk_bits"]
    what = "It runs" if forecast["converted"] else f"With experts of {bits} bits and a trunk of {trunk_bits} it runs"
    if best["native"]:
        what = "It runs with experts as the checkpoint stores them"
    lines = [
        f"{what}: {best['slots']:,} of {count:,} experts in memory, {format_bytes(memory['process_bytes'])} in all."
    ]
    if best["device_slots"] is not None:
        lines.append(f"{best['device_slots']:,} of them fit into the GPU's memory.")
    else:
        moment = "Speeds are those of this moment."
        if said := busy(forecast["machine"]["cpus_of_others"]):
            moment = f"{said[0].upper()}{said[1:]} meanwhile: without them it may be twice as fast. Run it again then."
        lines.append(f"Hits are estimated from the trace {best['hit_curve']}. {moment}")
    if best["as_it_is"]:
        lines.append("No conversion is needed: the files of the checkpoint are used as downloaded.")
    elif any(choice["as_it_is"] for choice in forecast["choices"]):
        lines.append("With experts of 16 bits no conversion is needed: the files are used as downloaded.")
    if forecast["quantised_with"] is not None and bits < 16:
        lines.append(
            f"The experts are quantised already, with {plain(forecast['quantised_with'])}, and lose quality when they "
            "are quantised again: --bits 16 keeps their values."
        )
    if forecast["perhaps_native"] is not None:
        lines.append(
            f"config.json says that the weights are quantised ({plain(forecast['perhaps_native'])}): convert and pull "
            "keep them with --bits native in place of the bits below, if they can. A plan of the hub's model says more."
        )
    if best["all_resident"]:
        lines.append("Everything stays in memory once it has been read. More memory would not help.")
    elif best["streams"]:
        experts = forecast["blocks"] * forecast["top_k"]
        lines.append(
            f"Caching hardly helps: {best['slots']:,} slots are fewer than the {experts:,} "
            "experts that one token uses, so most experts are read again for each token."
        )
    if (free := forecast["without_ram"]) is not None:
        lines.append(_without_ram(free, count))
    lines += _bad(same)
    cards = [
        f"{card['card']} {_rate(card['tokens_per_s_at_most'])}, with {card['slots']:,} experts in its memory"
        for card in best["cards"]
        if card["card"] in SHOWN_CARDS
    ]
    if cards and best["disk_bytes"] >= MIN_FOR_CARDS:
        lines.append(f"On a GPU at most, in tokens/s, by data sheets and not measured: {'; '.join(cards)}.")
    return lines + [command for name in ("pull", "convert", "chat", "serve") if (command := recommended[name])]


def _without_ram(free: dict[str, Any], count: int) -> str:
    """Return what a choice is like with as much memory as there is. ``count``: number of all experts."""
    slots = f"all {count:,}" if free["all_resident"] else f"{free['slots']:,} of {count:,}"
    speed = "" if free["decode"] is None else f": {_rate(free['decode']['tokens_per_s'])} tokens/s"
    return f"Without --ram, {slots} experts have room in memory{speed}."


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rate(tokens: float) -> str:
    return f"{tokens:.2f}" if tokens < 1 else f"{tokens:.1f}" if tokens < 10 else f"{tokens:.0f}"
