"""Loading a model over the tiers: ``moetier.load``, and ``register`` for transformers' ``from_pretrained``.

Others use ``load``, ``registration`` and ``tiers``. The package imports ``client``, ``moe``, ``speculation`` and
``trace``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tiers import Tiers as Tiers

__getattr__ = exports(__name__, {"Tiers": "tiers"})
