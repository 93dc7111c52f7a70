"""A client of the storage daemon: a host tier whose memory belongs to the daemon on this or another machine.

Others use ``tier.DaemonTier``. When the daemon is lost, ``misses`` reads from the local store. The package imports
``runtime.wire`` and ``tiers``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import DaemonTier as DaemonTier

__getattr__ = exports(__name__, {"DaemonTier": "tier"})
