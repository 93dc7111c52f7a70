"""The host tier: a cache of experts in host memory, filled from a store by demands and prefetches.

Other packages use ``tier.HostTier``, ``warmup``, and the events in ``demands``. The package imports ``arena``,
``cache``, ``store`` and the top-level modules of ``tiers``. It does not import torch.

The tier's state is the ledger (``ledger``, with its parts ``demands``, ``waiting``, ``slots``, ``loads``,
``prefetch`` and ``uses``) and the arena's directory. One lock guards all of it: that of the tier's
``tiers.locks.Monitor``. Each change is a *transition*, a method with one of the decorators of ``tiers.locks``;
``tier``, ``disk_order``, ``loaders``, ``session`` and ``uses`` have all of them. No transition waits for a read or for
another transition; the first session starts a thread in one. Records are written into slots without the lock, by the
one loader that has taken the load of the slot.

    thread                  transitions
    any thread that demands HostTier._begin, _next_leases, which sleeps until a record arrives, and _end;
                            HostUses
    moetier-loader-N        Loaders._take; then the read; then _complete, or _fail if the read failed
    moetier-timekeeper      Timekeeper._expire; runs if there are sessions
    moetier-learner         HostUses.counts and HostTier._warm (``warmup``)
    threads of a daemon     methods of Session, which never wait for a record
    threads of an engine    HostDiskOrder: they read and write pages of keys and values
    any finalizer           HostTier._end, which is posted: another thread may run it

If a read fails, the slot becomes EMPTY, and every demand that waits for the record gets the error (``Loads.fail``): an
iterator of ``acquire`` raises it, a session delivers ``Failed``. The next demand reads the record again. The store has
tried all that it can before: a second read, mirrors, a download. If a loader or the timekeeper itself fails, the tier
is condemned (``HostTier.condemn``): no caller waits for a thread that has ended.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import HostTier as HostTier

__getattr__ = exports(__name__, {"HostTier": "tier"})
