"""What the daemon and its clients share: addresses, channels, the control socket, pieces of records, failures.

Others use ``address``, ``channel`` and ``probe`` (a look at a running daemon). The package imports ``proto``, grpc and
the nouns of ``tiers``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .address import Address as Address
    from .address import Credentials as Credentials

__getattr__ = exports(__name__, {"Address": "address", "Credentials": "address"})
