"""ReportedReader: a reader whose failures are in the log too, and not only at those who wait for the record."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from moetier.tiers.errors import StoreError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import RecordReader, StagedPrefix

from .log import Sparing

_log = logging.getLogger(__name__)


class ReportedReader:
    """A RecordReader over another one, which stays its owner's."""

    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader
        self._failures = Sparing(_log, "read-failed")

    @property
    def manifest(self) -> Manifest:
        return self._reader.manifest

    @property
    def parts(self) -> ReportedReader | None:
        return None if self._reader.parts is None else self

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """As the other reader does."""
        with self._saying(key):
            self._reader.read_into(key, buffer, pause)

    def read_part(self, key: ExpertKey, start: int, part: memoryview) -> None:
        """As the other reader does; what fails here comes again."""
        assert self._reader.parts is not None
        self._reader.parts.read_part(key, start, part)

    def read_rest(
        self, key: ExpertKey, buffer: memoryview, prefix: StagedPrefix, pause: Callable[[], bool] | None = None
    ) -> None:
        """As the other reader does."""
        assert self._reader.parts is not None
        with self._saying(key):
            self._reader.parts.read_rest(key, buffer, prefix, pause)

    @contextlib.contextmanager
    def _saying(self, key: ExpertKey) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            self._failures.say(model=self.manifest.model, expert=key, cause=error.cause)
            raise
