"""Work that is measured in a fresh process, which nothing before it has warmed: the parent's side."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from moetier.runtime.config import format_bytes
from moetier.tiers.errors import BudgetError, ConfigError, MoetierError

from .cgroup import memory_group
from .page_cache import drop_page_cache

KILLED = -9


def fresh(work: dict[str, Any], *, limit: int | None = None, files: Iterable[Path] = ()) -> dict[str, Any]:
    """What ``bench_child`` says of ``work``, run in a process of its own; before, the page cache is dropped.

    ``files`` are those of the model. With ``limit`` the whole cache is dropped, and the process is in a control group
    of so many bytes, whose peak, pages of files included, is ``group_peak_bytes``. ``page_cache`` says what was
    dropped. Raises MoetierError.
    """
    command = [sys.executable, "-m", "moetier.tools.bench.child"]
    page_cache = drop_page_cache(files, whole=limit is not None)
    with nullcontext() if limit is None else memory_group(limit) as group:
        if group is None:
            result = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)
        else:
            result = group.run(command, text=json.dumps(work))
        peak = None if group is None else group.peak
    if limit is not None and result.returncode in (KILLED, 128 - KILLED):
        raise BudgetError(
            f"It was killed for memory in a control group of {format_bytes(limit)}.",
            "Give a greater --limit, or a smaller --ram.",
        )
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        said = next(reversed(result.stderr.splitlines()), f"exit status {result.returncode}")
        raise ConfigError(f"What was measured failed: {said}", "Its process said more with MOETIER_DEBUG=1.")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise MoetierError(*found["error"])
    return found | {"group_peak_bytes": peak, "page_cache": page_cache}
