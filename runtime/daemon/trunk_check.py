"""TrunkCheck: the checksums of a trunk's files, compared once in the background of a daemon."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from moetier.tiers.errors import StoreError
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.trunk import check_sum

from .log import say

SHARE = 0.1  # of the time that it reads for: reads of records come first

_log = logging.getLogger(__name__)


class TrunkCheck:
    """Of the files that a model directory has. The daemon uses none of them: what is wrong is in its log, for the
    processes that load them."""

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        self._manifest = manifest
        self._directory = directory
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moetier-trunk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        for name, entry in self._manifest.trunk.items():
            path = self._directory / name
            if not path.is_file():
                continue
            try:
                began = time.monotonic()
                for _ in check_sum(path, entry, cached=True):
                    if self._ending.wait((time.monotonic() - began) * (1 / SHARE - 1)):
                        return
                    began = time.monotonic()
            except StoreError as error:
                say(_log, "trunk-damaged", logging.ERROR, model=self._manifest.model, cause=error.cause, fix=error.fix)
