"""ReportedReader: a reader whose failures are in the log too, and not only at those who wait for the record."""

from __future__ import annotations

import logging
from collections.abc import Callable

from moetier.tiers.errors import StoreError
from moetier.tiers.keys import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import RecordReader

from .logfmt import Sparing

_log = logging.getLogger(__name__)


class ReportedReader:
    """A RecordReader over another one, which stays its owner's."""

    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader
        self._failures = Sparing(_log, "read-failed")

    @property
    def manifest(self) -> Manifest:
        return self._reader.manifest

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """As the other reader does."""
        try:
            self._reader.read_into(key, buffer, pause)
        except StoreError as error:
            self._failures.say(model=self.manifest.model, expert=key, cause=error.cause)
            raise
