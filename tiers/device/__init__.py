"""The device tier: a cache of experts in GPU memory, or on a CPU views of the host tier.

Other packages use ``tier.DeviceTier`` and ``views.HostViews``. The package imports torch, ``cache`` and the top-level
modules of ``tiers``. It uses the host tier only through the interface in ``tiers.source``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import DeviceTier as DeviceTier
    from .views import HostViews as HostViews

__getattr__ = exports(__name__, {"DeviceTier": "tier", "HostViews": "views"})
