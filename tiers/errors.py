"""What can go wrong through no fault of this project's code. A fault of ours is an ``assert``.

MoetierError
├── StoreError                 the SSD tier
│   ├── StoreFormatError       not a store that this version reads
│   ├── IncompleteStoreError   its conversion was cut
│   ├── MissingExpertError     a record that is not there
│   ├── ChecksumError          a record whose bytes are not what was written
│   └── StoreReadError         the disk answered with an error
├── CheckpointError            a source checkpoint that can't be read
│   ├── UnsafeCheckpointError  pickle, code of its own, paths that lead out of it
│   └── UnsupportedModelError  dense, or without transformers' experts interface
├── TargetError                the place that a conversion would write to
│   ├── TargetExistsError      it holds something else
│   └── DiskSpaceError         it is too small
├── BudgetError                memory budgets that can't work
├── ArenaError                 shared memory that is not safe to map
├── ExhaustedError             every slot of the host tier is leased, for longer than a caller waits
├── DaemonError                the daemon, or the way to it
│   ├── UnavailableError       nobody answers, or not any more
│   ├── RefusedError           credentials that are missing or wrong, another user, no TLS
│   ├── UnknownModelError      a daemon that does not serve this store
│   ├── ProtocolError          what came over the wire is not what this version speaks
│   └── AlreadyRunningError    the place of a daemon is taken by a running one
├── ConfigError                an option that is unknown or malformed
└── ClosedError                a tier was used after close()
"""

from __future__ import annotations


class MoetierError(Exception):
    """One line of cause and one line of what to do."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(f"{cause}\n{fix}")
        self.cause = cause
        self.fix = fix

    def __reduce__(self) -> tuple[type[MoetierError], tuple[str, str]]:
        return type(self), (self.cause, self.fix)


class StoreError(MoetierError):
    """The SSD tier."""


class StoreFormatError(StoreError):
    """Not a store that this version reads."""


class IncompleteStoreError(StoreError):
    """Its conversion was cut; the fix names the command that resumes it."""


class MissingExpertError(StoreError):
    """A record that is not there."""


class ChecksumError(StoreError):
    """A record whose bytes are not what was written."""


class StoreReadError(StoreError):
    """The disk answered with an error, twice."""


class CheckpointError(MoetierError):
    """A source checkpoint that can't be read."""


class UnsafeCheckpointError(CheckpointError):
    """Pickle, code of its own, or paths that lead out of the checkpoint."""


class UnsupportedModelError(CheckpointError):
    """A dense model, or an architecture without transformers' experts interface."""


class TargetError(MoetierError):
    """The place that a conversion would write to."""


class TargetExistsError(TargetError):
    """It holds a different model, or something that is no model."""


class DiskSpaceError(TargetError):
    """It is too small."""


class BudgetError(MoetierError):
    """A memory budget that can't work; the fix names the smallest and the largest that do."""


class ArenaError(MoetierError):
    """Shared memory of another process that is not safe to map."""


class ExhaustedError(MoetierError):
    """Every slot of the host tier is leased, and none came free for as long as the caller waits."""


class DaemonError(MoetierError):
    """The daemon, or the way to it."""


class UnavailableError(DaemonError):
    """Nobody answers, or not any more: another daemon, or the store itself, may do instead."""


class NobodyError(UnavailableError):
    """No daemon runs there."""


class RefusedError(DaemonError):
    """Credentials that are missing or wrong, another user, no TLS."""


class UnknownModelError(DaemonError):
    """A daemon that does not serve this store."""


class ProtocolError(DaemonError):
    """What came over the wire is not what this version speaks."""


class AlreadyRunningError(DaemonError):
    """The place of a daemon is taken by a running one, which is named."""


class ConfigError(MoetierError):
    """An option that is unknown or malformed."""


class ClosedError(MoetierError):
    """A tier was used after close()."""
