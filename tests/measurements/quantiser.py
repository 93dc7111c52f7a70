"""Compare llama.cpp's quantiser with ``moetier bench convert``: both convert SRC to 4 bits, in alternating runs.

    python tests/measurements/quantiser.py SRC

For llama.cpp, SRC is first exported to a GGUF file of 16 bits, which takes as much disk space as SRC. llama.cpp
quantises this file to Q4_0, as ``llama-quantize --pure`` does. It quantises every matrix except the gates; only the
time of ``llama_model_quantize`` counts. The extra ``peers`` installs llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engines import llama_quantize, run_script
from gguf_export import export_gguf

from moetier.runtime.machine.threads import usable_cpus
from moetier.tiers.errors import ConfigError
from moetier.tiers.store.atomic import disk_errors
from moetier.tools.bench import convert
from moetier.tools.bench.convert import add_arguments
from moetier.tools.bench.sandbox import drop_page_cache

__all__ = ["add_arguments"]

EXAMPLES = ("python tests/measurements/quantiser.py ./Mixtral-8x7B-v0.1",)

BITS = 4  # of llama.cpp's weights


def run(arguments: argparse.Namespace) -> None:
    """Measure and print. Raises MoetierError."""
    if arguments.bits != BITS:
        raise ConfigError(f"llama.cpp's weights have {BITS} bits, and --bits is {arguments.bits}.", "Leave it out.")
    with tempfile.TemporaryDirectory(prefix="moetier-bench-", dir=arguments.into) as name:
        folder = Path(name)
        source = folder / "source.gguf"
        with disk_errors(folder):
            export_gguf(arguments.source, source, ggml_type="F16", quiet=False)
        threads = arguments.workers or arguments.threads or usable_cpus()
        way = partial(quantize_once, source, folder / "target.gguf", threads)
        convert.measure(arguments, {"llama.cpp Q4_0": way})


def quantize_once(source: Path, target: Path, threads: int) -> dict[str, Any]:
    """Run llama.cpp's quantiser and return what ``convert_once`` returns.

    ``weights`` are those that are in Q4_0 afterwards, and the time is that of llama.cpp's call.
    """
    import gguf

    drop_page_cache([source], whole=False)
    seconds, peak = llama_quantize(source, target, threads=threads)
    tensors, ggml_type = gguf.GGUFReader(target).tensors, gguf.GGMLQuantizationType.Q4_0
    weights = sum(int(tensor.n_elements) for tensor in tensors if tensor.tensor_type == ggml_type)
    target.unlink()
    return {"weights": weights, "source_bytes": source.stat().st_size, "seconds": seconds, "peak_bytes": peak}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line ``words``, by default sys.argv's, and return the exit code."""
    return run_script(__name__, "Convert a checkpoint beside llama.cpp's quantiser.", words)


if __name__ == "__main__":
    sys.exit(main())
