"""Errors that have a cause outside this project's code. Faults of the code itself are found by ``assert``.

MoetierError
├── StoreError                 the SSD tier
│   ├── StoreFormatError       not a store that this version reads
│   ├── IncompleteStoreError   a store whose conversion was interrupted
│   ├── MissingExpertError     a record that does not exist
│   ├── ChecksumError          a record whose bytes are not those that were written
│   └── StoreReadError         the disk answered with an error
├── CheckpointError            a source checkpoint that can't be read
│   ├── UnsafeCheckpointError  pickle, custom code, or paths that lead out of the checkpoint
│   └── UnsupportedModelError  dense, or without transformers' experts interface
├── TargetError                the place that a conversion writes to
│   ├── TargetExistsError      the target holds something else
│   └── DiskSpaceError         the disk is too small
├── BudgetError                memory budgets that can't work
├── ArenaError                 shared memory that is not safe to map
├── ExhaustedError             every slot of the host tier stayed leased while a caller waited
├── DaemonError                the daemon, or the connection to it
│   ├── UnavailableError       nothing answers, or not any more
│   │   └── NoDaemonError      no daemon runs in this folder
│   ├── RefusedError           missing or wrong credentials, another user, no TLS
│   ├── UnknownModelError      a daemon that does not serve this store
│   ├── ProtocolError          a message that this version does not understand
│   └── AlreadyRunningError    another daemon is running in this folder
├── ConfigError                an unknown or malformed option
└── ClosedError                a tier was used after close()
"""

from __future__ import annotations


class MoetierError(Exception):
    """An error with one line of cause and one line that says what to do."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(f"{cause}\n{fix}")
        self.cause = cause
        self.fix = fix

    def __reduce__(self) -> tuple[type[MoetierError], tuple[str, str]]:
        return type(self), (self.cause, self.fix)


class StoreError(MoetierError):
    """An error of the SSD tier."""


class StoreFormatError(StoreError):
    """The directory is not a store that this version can read."""


class IncompleteStoreError(StoreError):
    """The store's conversion was interrupted; the fix names the command that resumes it."""


class MissingExpertError(StoreError):
    """A record does not exist."""


class ChecksumError(StoreError):
    """The bytes of a record are not those that were written."""


class StoreReadError(StoreError):
    """The disk has answered a read with an error. After EIO the read was tried a second time."""


class CheckpointError(MoetierError):
    """A source checkpoint can't be read."""


class UnsafeCheckpointError(CheckpointError):
    """The checkpoint has pickled files, custom code, or paths that lead out of its folder."""


class UnsupportedModelError(CheckpointError):
    """The model is dense, or its architecture lacks the experts interface of transformers."""


class TargetError(MoetierError):
    """A conversion can't write to its target."""


class TargetExistsError(TargetError):
    """The target holds a different model, or something that is not a model."""


class DiskSpaceError(TargetError):
    """The disk of the target is too small."""


class BudgetError(MoetierError):
    """A memory budget can't work; the fix names the smallest and the largest that do."""


class ArenaError(MoetierError):
    """Shared memory of another process is not safe to map."""


class ExhaustedError(MoetierError):
    """The caller got no slot of the host tier within the time for which it was willing to wait."""


class DaemonError(MoetierError):
    """An error of the daemon, or of the connection to it."""


class UnavailableError(DaemonError):
    """The daemon does not answer, or no longer does. Another daemon, or the local store, may serve instead."""


class NoDaemonError(UnavailableError):
    """No daemon runs in the folder that was named."""


class RefusedError(DaemonError):
    """The daemon refuses the caller: missing or wrong credentials, another user, no TLS."""


class UnknownModelError(DaemonError):
    """The daemon does not serve this store."""


class ProtocolError(DaemonError):
    """A message over the wire is not one that this version understands."""


class AlreadyRunningError(DaemonError):
    """Another daemon, which the error names, is already running in this folder."""


class ConfigError(MoetierError):
    """An option is unknown or malformed."""


class ClosedError(MoetierError):
    """A tier was used after close()."""
