"""Wire protocol that the daemon and its clients share: addresses, channels, the control socket, pieces and errors.

Others use ``address``, ``channel`` and ``probe``, which asks a running daemon what it is. The package imports
``proto``, grpc and the nouns of ``tiers``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .address import Address as Address
    from .address import Credentials as Credentials

__getattr__ = exports(__name__, {"Address": "address", "Credentials": "address"})
