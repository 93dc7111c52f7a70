"""The host tier: a cache of experts in host memory, filled from a store by demands and prefetches.

Other packages use ``tier.HostTier``, ``warmup``, and the events in ``demands``. The tier's state changes only under the
lock of a ``tiers.locks.Monitor``. The package imports ``arena``, ``cache``, ``store`` and the top-level modules of
``tiers``. It does not import torch.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import HostTier as HostTier

__getattr__ = exports(__name__, {"HostTier": "tier"})
