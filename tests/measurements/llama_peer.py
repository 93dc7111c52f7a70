"""Run llama.cpp: read a job from standard input and print the result, both as JSON.

``engines.py`` starts this program. It imports nothing large, as that would count as llama.cpp's memory.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from own_variables import remove_own_variables

from moetier.runtime.machine.memory import peak_bytes

UBATCH = 512  # tokens that llama.cpp computes together: its own default


def main() -> None:
    """Do the job that standard input gives, to quantise or to feed tokens, and print its result as JSON."""
    job = json.load(sys.stdin)
    remove_own_variables()
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    print(json.dumps(_quantize(llama_cpp, job) if "target" in job else _feed(llama_cpp, job)))


def _quantize(llama_cpp: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Quantise a GGUF file as ``llama-quantize`` does: with ``--pure`` to Q4_0, or without it to the job's kind."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.nthread, how.pure = job["threads"], "kind" not in job
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.get('kind', 'Q4_0')}")
    start = time.perf_counter()
    status = llama_cpp.llama_model_quantize(job["gguf"].encode(), job["target"].encode(), ctypes.byref(how))
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{job['gguf']} can't be quantised: llama_model_quantize returned {status}")
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def _feed(llama_cpp: Any, job: dict[str, Any]) -> dict[str, Any]:
    model, context = _open(llama_cpp, job)
    warmup, tokens = job["tokens"][: job["warmup"]], job["tokens"][job["warmup"] :]
    if job["one_by_one"]:
        for token in warmup:
            _decode(llama_cpp, context, [token])
        start = time.perf_counter()
        for token in tokens:
            _decode(llama_cpp, context, [token])
    else:
        if warmup:
            _decode(llama_cpp, context, warmup)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        _decode(llama_cpp, context, tokens)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "tokens": len(tokens),
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
    }
    if job["logits"]:
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        result["logits"] = llama_cpp.llama_get_logits_ith(context, -1)[:vocabulary]
    return result


def _open(llama_cpp: Any, job: dict[str, Any]) -> tuple[Any, Any]:
    how = llama_cpp.llama_model_default_params()
    how.n_gpu_layers = 0
    how.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if job["mmap"] else llama_cpp.LLAMA_LOAD_MODE_NONE
    how.use_extra_bufts = job["repack"]
    model = llama_cpp.llama_model_load_from_file(job["gguf"].encode(), how)
    if not model:
        sys.exit(f"{job['gguf']} can't be loaded")
    what = llama_cpp.llama_context_default_params()
    what.n_ctx = len(job["tokens"]) + 8
    what.n_batch = max(UBATCH, len(job["tokens"]))
    what.n_ubatch = UBATCH
    what.n_threads = what.n_threads_batch = job["threads"]
    context = llama_cpp.llama_init_from_model(model, what)
    if not context:
        sys.exit(f"no context of {what.n_ctx} tokens can be made")
    return model, context


def _decode(llama_cpp: Any, context: Any, tokens: Sequence[int]) -> None:
    """Through the whole model, logits of the last included."""
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    if status := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens))):
        sys.exit(f"llama_decode returned {status}")
    llama_cpp.llama_synchronize(context)


if __name__ == "__main__":
    main()
