"""Loading a model over the tiers: ``moetier.load``, and ``register`` for transformers' ``from_pretrained``.

Other packages use ``load``, ``register``, ``prefill_memory`` and ``tiers``. The package imports ``checkpoint``,
``client``, ``kernels``, ``moe`` and ``speculation`` of ``runtime``, and ``tiers``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tiers import Tiers as Tiers

__getattr__ = exports(__name__, {"Tiers": "tiers"})
