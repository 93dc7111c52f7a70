"""The device tier: on a GPU, a cache of experts in its memory; on a CPU, views of the host tier's memory.

Other packages use ``tier.DeviceTier`` and ``views.HostViews``. The package imports torch, ``cache`` and the top-level
modules of ``tiers``. It uses the host tier only through the interfaces in ``tiers.source``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import DeviceTier as DeviceTier
    from .views import HostViews as HostViews

__getattr__ = exports(__name__, {"DeviceTier": "tier", "HostViews": "views"})
