"""Program for one measurement: it reads from standard input what to measure, and prints the result, both as JSON.

``sandbox`` starts it as ``python -m moetier.tools.bench.child``. The field ``work`` of the input names the function
that measures: ``idle``, ``model`` or ``rates``. The function gets the whole input.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.machine.memory import peak_bytes
from moetier.tiers.errors import BudgetError, ConfigError, MoetierError

if TYPE_CHECKING:
    from torch import Tensor


def idle(work: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory of a process that has only imported torch and transformers."""
    from moetier.runtime.libraries.lean import lean_imports

    with lean_imports():
        import transformers.generation.utils  # noqa: F401 - transformers imports its parts only when they are named

    return {"peak_bytes": peak_bytes()}


def model(work: dict[str, Any]) -> dict[str, Any]:
    """Load a model, feed tokens to it in pieces, and return the times of the last pieces, with counters and sizes.

    ``work`` has the model's ``directory``, token ``ids`` [sequences][tokens], the numbers of tokens of the ``pieces``,
    and how many pieces to time (``measured``). If it has ``seconds``, no piece is begun after so many. If it has
    ``record``, ``used`` in the result has the experts that each piece used, by block; recording makes the run slower.
    ``ram``, ``threads`` and ``options`` are options of ``load``.
    """
    from moetier.runtime.libraries.lean import lean_imports

    with lean_imports():
        import torch
        import transformers

        from moetier.runtime.model.budgets import kv_cache_bytes
        from moetier.runtime.model.load import load

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        began = time.perf_counter()
        sequences = len(work["ids"])
        options = {"context": sum(map(len, work["ids"])), "prefill_chunk": sequences * max(work["pieces"])}
        options |= {"threads": work.get("threads")} | work.get("options", {})
        loaded, _ = load(work["directory"], daemon=None, ram=work.get("ram"), **options)
        load_seconds = time.perf_counter() - began
    ids = torch.tensor(work["ids"], device=loaded.device)  # [sequences, tokens]
    with loaded.tiers, torch.inference_mode():
        chunk = _chunk_of(loaded, ids, work["pieces"])
        return {
            "threads": torch.get_num_threads(),
            "prefill_chunk": chunk,
            "load_s": load_seconds,
            **_feed(loaded, ids, chunk, work),
            "slots": loaded.tiers.host.layout.slots_by_array,
            "trunk_bytes": _trunk_bytes(loaded),
            "kv_bytes": kv_cache_bytes(loaded.config, ids.shape[1], len(ids), loaded.dtype),
            "peak_bytes": peak_bytes(),
        }


def _chunk_of(model: Any, ids: Tensor, pieces: list[int]) -> int:
    """Return how many tokens of each sequence are computed together: memory may have no room for a whole piece.

    ``ids``: [sequences, tokens]. Raises ConfigError if these exceed the model's context, BudgetError if the model can't
    divide a piece for which memory has no room.
    """
    from moetier.runtime.model.context import longest_context

    sequences, tokens = ids.shape
    if (most := longest_context(model.config)) is not None and tokens > most:
        raise ConfigError(
            f"The run needs {tokens:,} tokens, but the model's maximum context is {most:,}.",
            "Give less for --tokens, --prompt or --warm.",
        )
    chunk: int = max(model.tiers.prefill_chunk // sequences, 1)
    if not model.tiers.prefill.resumes and chunk < max(pieces):
        raise BudgetError(
            f"Memory has no room to compute {sequences * max(pieces):,} tokens together, and this model can't divide "
            "them.",
            "Give less for --tokens, --prompt or --ram.",
        )
    return chunk


def _feed(model: Any, ids: Tensor, chunk: int, work: dict[str, Any]) -> dict[str, Any]:
    """Feed ``ids`` [sequences, tokens] to the model in the pieces of ``work``, ``chunk`` tokens at a time.

    Return the seconds and the counters of the measured pieces, and the experts that each piece used.
    """
    import torch

    from moetier.runtime.generation.compat import CACHE
    from moetier.runtime.moe.gates import Gates

    used: list[list[list[int]]] = []

    def note(block: int, experts: Any, weights: Any) -> None:
        used[-1][block] = sorted({*used[-1][block], *experts.flatten().tolist()})

    if work.get("record"):
        Gates(model).observe(experts=note)
    seconds, cache, start, before = [], None, 0, model.tiers.host.stats()
    end = time.perf_counter() + work.get("seconds", math.inf)
    for number, length in enumerate(work["pieces"]):
        if time.perf_counter() > end:
            break
        used.append([[] for _ in model.tiers.manifest.blocks])
        if number == len(work["pieces"]) - work["measured"]:
            before = model.tiers.host.stats()
        began = time.perf_counter()
        for part in torch.split(ids[:, start : start + length], chunk, 1):
            output = model(part, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        output.logits[:, -1].argmax(-1).tolist()  # waits for the device, as generation does
        seconds.append(time.perf_counter() - began)
        start += length
    after = model.tiers.host.stats()
    return {
        "seconds": seconds[-work["measured"] :],
        "hits": after.hits - before.hits,
        "misses": after.misses - before.misses,
        "bytes_read": after.bytes_in - before.bytes_in,
        "used": used,
    }


def rates(work: dict[str, Any]) -> dict[str, Any]:
    """Return the rates of memory and of kernels, in bytes per second.

    Kernels multiply with random records that have the layouts of a model. ``work`` has the model's ``directory``, the
    numbers of ``rows`` to measure, the ``seconds`` that each of these takes, and the ``bytes`` of records to use.
    """

    from moetier.runtime.devices.cpu import Cpu
    from moetier.runtime.machine.threads import use_threads
    from moetier.runtime.stores.registry import read_manifest
    from moetier.tools.rates.products import KernelProbe, memory_rate, random_records

    use_threads(work.get("threads"))
    memory, by = memory_rate(work["bytes"])
    manifest = read_manifest(Path(work["directory"]))
    nbytes, seconds = 0, dict.fromkeys(work["rows"], 0.0)  # sums over all records; each layout has its own rate
    for array, layout in manifest.layouts.items():
        size = sum(block.experts for block in manifest.members[array].values()) * layout.slot_bytes
        products = KernelProbe(Cpu().kernels(), layout, random_records(layout, work["bytes"]))
        nbytes += size
        for rows in seconds:
            seconds[rows] += size / products.rate(rows, at_least=work["seconds"])
    return {"memory": memory, "memory_by": by, "kernels": {str(rows): nbytes / s for rows, s in seconds.items()}}


def _trunk_bytes(model: Any) -> int:
    """Return the bytes of the trunk that a token reads: parameters and buffers, without the input embeddings.

    Embeddings that are also the weights of the output head are counted.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.nbytes}
    for tensor in embeddings.parameters():
        if head is None or all(tensor.data_ptr() != other.data_ptr() for other in head.parameters()):
            sizes.pop(tensor.data_ptr(), None)
    return sum(sizes.values())


WORKS = {"idle": idle, "model": model, "rates": rates}


def main() -> None:
    """Run the measurement that standard input describes, and print its result or error as JSON."""
    work = json.loads(sys.stdin.read())
    try:
        result = WORKS[work["work"]](work)
    except MoetierError as error:
        result = {"error": [error.cause, error.fix]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
