"""Wire protocol of daemon and clients: addresses, channels, the control socket, errors, requests, pieces of records.

Other packages use ``address``, ``channel`` and ``probe``, which asks a running daemon for its models and counters. The
package imports ``proto``, grpc and, from ``tiers``, only the checksum and modules that define shared terms, such as
``errors``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .address import Address as Address
    from .address import Credentials as Credentials

__getattr__ = exports(__name__, {"Address": "address", "Credentials": "address"})
