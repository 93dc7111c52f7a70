"""The host tier: a cache of experts in memory, its loads from a store, its prefetch queue and its sessions.

Others use ``tier.HostTier``, the events of ``demands``, ``warmup`` and ``staging.staging_bytes``. The
tier's state changes only under the lock of ``tiers.locks``. The package imports ``arena``, ``cache``, ``store`` and the
nouns, and no torch.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import HostTier as HostTier

__getattr__ = exports(__name__, {"HostTier": "tier"})
