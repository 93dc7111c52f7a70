"""Clients of the storage daemon: a host tier in a daemon's memory, and stores in the memory of daemons on other hosts.

Other packages use ``tier.DaemonTier``, ``spread.SpreadStore`` and ``remote_compute.RemoteCompute``. While the daemon
is away, ``fallback`` reads from the local store. ``disk_order`` says when pages of keys and values are read. The
package imports ``runtime.wire``, ``tiers``, and types of ``runtime.kernels``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import DaemonTier as DaemonTier

__getattr__ = exports(__name__, {"DaemonTier": "tier"})
