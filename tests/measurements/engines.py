"""Run other engines, each in a process of its own whose memory may be limited, and feed the same tokens to all.

llama.cpp reads a GGUF file (from ``gguf_export.py``) through the package llama-cpp-python. transformers with
accelerate's disk offload reads the checkpoint itself, in bf16. The extra ``peers`` installs both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tools.bench.sandbox import forget, run_limited
from moetier.tools.cli.parser import CommandParser, by_name
from moetier.tools.main import say


@dataclass(frozen=True, slots=True)
class Run:
    """Measured part of one process, after its warm-up."""

    tokens: int
    seconds: float
    peak_bytes: int  # pages of files included: of the control group, or of the process where that had more mapped

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class PeerError(ConfigError):
    """Another engine did not finish: it is not installed, or was killed for memory."""


def llama_run(
    gguf: Path,
    tokens: Sequence[int],
    *,
    together: bool = False,
    threads: int,
    limit: int | None = None,
    repack: bool = False,
    warmup: int = 0,
    mmap: bool = True,
) -> Run:
    """Feed tokens to llama.cpp and time them.

    They come one by one, as if they were generated, and the first ``warmup`` of them are not timed; or those after the
    first ``warmup`` come ``together``, as a prompt of their own.

    ``limit``: bytes for the process and its pages of files. ``repack`` copies the weights into an order that is quicker
    to multiply with, which needs all of them in memory a second time. ``mmap``: else the file is read into memory.
    Raises PeerError.
    """
    assert 0 <= warmup < len(tokens)
    if limit is not None:
        forget(gguf)
    job = {"gguf": str(gguf), "threads": threads, "repack": repack, "mmap": mmap, "one_by_one": not together}
    result, peak = _child("llama_peer", job | {"tokens": list(tokens), "warmup": warmup, "logits": False}, limit)
    return Run(result["tokens"], result["seconds"], peak)


def llama_logits(gguf: Path, tokens: Sequence[int], *, threads: int = 1) -> list[float]:
    """Return the logits [vocabulary] of the last token. Raises PeerError."""
    job = {"gguf": str(gguf), "threads": threads, "repack": False, "mmap": True, "one_by_one": False}
    result, _ = _child("llama_peer", job | {"tokens": list(tokens), "warmup": 0, "logits": True}, None)
    logits: list[float] = result["logits"]
    return logits


def llama_quantize(gguf: Path, target: Path, *, threads: int) -> tuple[float, int]:
    """Write ``target``, every matrix of ``gguf`` in Q4_0.

    Returns the seconds of llama.cpp's call and the process's peak in bytes. Raises PeerError.
    """
    result, _ = _child("llama_peer", {"gguf": str(gguf), "target": str(target), "threads": threads}, None)
    return result["seconds"], result["peak_bytes"]


def accelerate_decode(
    checkpoint: Path,
    tokens: Sequence[int],
    *,
    threads: int,
    limit: int | None = None,
    resident: int | None = None,
    warmup: int = 1,
    scratch: Path | None = None,
) -> Run:
    """Feed tokens to transformers one by one, in bf16, with accelerate's disk offload, and time them.

    ``resident`` bytes of weights stay in memory (without it, half of ``limit``); accelerate writes the others into
    ``scratch`` (a temporary folder beside the checkpoint), and reads them for every token. Raises PeerError.
    """
    with tempfile.TemporaryDirectory(dir=scratch or checkpoint.parent, prefix="offload-") as folder:
        room = resident if resident is not None else limit // 2 if limit is not None else None
        job = {"checkpoint": str(checkpoint), "threads": threads, "resident": room, "offload": folder}
        forget(checkpoint)
        assert 0 <= warmup < len(tokens)
        result, peak = _child("accelerate_peer", job | {"tokens": list(tokens), "warmup": warmup}, limit)
    return Run(result["tokens"], result["seconds"], peak)


def _child(module: str, job: dict[str, Any], limit: int | None) -> tuple[dict[str, Any], int]:
    """Run a job in a process of its own; return what it found, and its peak of memory in bytes."""
    command = [sys.executable, str(Path(__file__).with_name(f"{module}.py"))]
    ended, peak = run_limited(command, json.dumps(job), limit)
    if ended.returncode:
        raise PeerError(*_reason(module, ended, limit))
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result, max(peak or 0, result["peak_bytes"])


def _reason(module: str, ended: subprocess.CompletedProcess[str], limit: int | None) -> tuple[str, str]:
    name = {"llama_peer": "llama.cpp", "accelerate_peer": "transformers with accelerate"}[module]
    last = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
    if "ModuleNotFoundError" in last:
        return f"{name} is not installed ({last}).", 'Install it: pip install ".[peers]" in the repository.'
    if ended.returncode in (-9, 137) and limit is not None:
        return f"{name} was killed for memory, of which it had {limit:,} bytes.", "Give it more."
    return f"{name} ended with status {ended.returncode}: {last}", "See whether the machine has enough memory and disk."


def run_script(module: str, description: str, words: Sequence[str] | None = None) -> int:
    """Run a script's ``add_arguments`` and ``run`` as moetier runs a command's; return the exit code.

    ``module``: its name, as imported; ``words``: its command line, by default sys.argv's.
    """
    name = Path(str(sys.modules[module].__file__)).stem
    parser = CommandParser(prog=f"{name}.py", description=description, module=module)
    parser.set_defaults(what=name)
    try:
        arguments = parser.parse_args(words)
        status: int = arguments.run(by_name(arguments)) or 0
    except MoetierError as error:
        return say(error)
    return status
