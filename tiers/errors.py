"""Errors that moetier raises. Their causes lie outside its code; an ``assert`` fails if the code itself has a bug.

Those with a module in brackets are defined there, as only its package raises them.

MoetierError
├── StoreError                 the SSD tier
│   ├── StoreFormatError       not a store that this version can read
│   │   └── NotFoundError      no folder, file or model of a name
│   ├── IncompleteStoreError   a store whose conversion was interrupted
│   ├── MissingExpertError     a record that does not exist
│   ├── ChecksumError          a record whose bytes are not those that were written
│   └── StoreReadError         the system reported an error when a file was read
│       └── RefusedReadError   an object store refused a request (tiers.objects.client)
├── CheckpointError            a source checkpoint that can't be read
│   ├── UnsafeCheckpointError  pickle, custom code, or paths that lead out of the checkpoint
│   └── UnsupportedModelError  dense, or without transformers' experts interface
├── TargetError                the place that a conversion writes to
│   ├── TargetExistsError      something else is already there
│   └── DiskSpaceError         the disk has too little free space
├── BudgetError                a memory budget that can't work
├── ArenaError                 shared memory that can't be used
├── ExhaustedError             no slot became free while a caller waited, or there is no thread
├── DaemonError                the daemon, or the connection to it
│   ├── UnavailableError       the daemon does not answer, or no longer does
│   │   └── NoDaemonError      no daemon runs in this folder
│   ├── RefusedError           the daemon refused the caller
│   ├── UnknownModelError      a daemon that does not serve this store
│   ├── ProtocolError          a message that this version does not understand
│   └── AlreadyRunningError    another daemon is running in this folder
├── ConfigError                an unknown or malformed option
│   └── UsageError             options that are wrong for every model and machine (tools.cli.parser)
├── DeadlineError              a request was not answered by its deadline (runtime.engine.sequence)
├── EngineError                the engine can't compute any more (runtime.engine.sequence)
├── GrammarError               a grammar that can't be compiled (runtime.engine.grammar)
├── NoTokenError               scores by which no token can be chosen (runtime.engine.sampling)
└── ClosedError                an object was used after close(), or in a forked child
"""

from __future__ import annotations

from typing import Self

# fixes of many errors
SAME_VERSION = "Use the same version of moetier on both sides."
DOWNLOAD_AGAIN = "Download the checkpoint again."


class MoetierError(Exception):
    """Base of all errors of moetier.

    ``cause`` is a line that says what is wrong, ``fix`` a line that says what to do about it. The message has both.
    """

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(f"{cause}\n{fix}")
        self.cause = cause
        self.fix = fix

    def fresh(self) -> Self:
        """Return a copy without traceback. Each thread raises its own, as a raised error keeps frames of its thread."""
        return type(self)(self.cause, self.fix)

    def __reduce__(self) -> tuple[type[MoetierError], tuple[str, str]]:
        return type(self), (self.cause, self.fix)


class StoreError(MoetierError):
    """Base of the errors of a store."""


class StoreFormatError(StoreError):
    """The directory is not a store that this version can read."""


class NotFoundError(StoreFormatError):
    """There is no folder, file or model of the name that was given."""


class IncompleteStoreError(StoreError):
    """The store's conversion was interrupted. The fix names the command that resumes the conversion."""


class MissingExpertError(StoreError):
    """A record does not exist."""


class ChecksumError(StoreError):
    """The bytes of a record are not those that were written."""


class StoreReadError(StoreError):
    """The system reported an error when a file was read. A record is read a second time after EIO."""


class CheckpointError(MoetierError):
    """A source checkpoint can't be read."""


class UnsafeCheckpointError(CheckpointError):
    """The checkpoint has pickled files, code of its own, or paths that lead out of its folder."""


class UnsupportedModelError(CheckpointError):
    """The model has no experts, or its architecture does not use the experts interface of transformers."""


class TargetError(MoetierError):
    """A conversion can't write to its target."""


class TargetExistsError(TargetError):
    """The target holds a different model, or something that is not a model."""


class DiskSpaceError(TargetError):
    """The disk of the target has too little free space."""


class BudgetError(MoetierError):
    """A memory budget is too small or too large, or the memory is not available."""


class ArenaError(MoetierError):
    """Shared memory is not an arena of the expected store, or not safe to map."""


class ExhaustedError(MoetierError):
    """A caller got no slot of the host tier within the time for which it may wait, or the system gives no thread."""


class DaemonError(MoetierError):
    """An error of the daemon, or of the connection to the daemon."""


class UnavailableError(DaemonError):
    """The daemon does not answer, or no longer does. Another daemon or the local store may have the records."""


class NoDaemonError(UnavailableError):
    """No daemon runs in the given folder."""


class RefusedError(DaemonError):
    """The daemon refuses the caller: missing or wrong credentials, another user, no TLS."""


class UnknownModelError(DaemonError):
    """The daemon does not serve this store."""


class ProtocolError(DaemonError):
    """The other side sent a message that this version does not understand."""


class AlreadyRunningError(DaemonError):
    """Another daemon, which the error names, is already running in this folder."""


class ConfigError(MoetierError):
    """An option is unknown or malformed."""


class ClosedError(MoetierError):
    """A tier, a store or a connection was used after ``close``, or in a forked child."""
