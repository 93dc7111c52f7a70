"""The device tier: a cache of experts in GPU memory, or on a CPU views of the host tier.

Others use ``tier.DeviceTier`` and ``views.HostViews``. The package imports torch, ``cache`` and the nouns; of the host
tier it knows only the interface in ``tiers.source``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tier import DeviceTier as DeviceTier
    from .views import HostViews as HostViews

__getattr__ = exports(__name__, {"DeviceTier": "tier", "HostViews": "views"})
