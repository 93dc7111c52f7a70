"""The memory of the host cache: one file that other processes can map, with a directory of what lies in it.

Clients map an arena without a host tier. A new owner reclaims the arena of a dead one. The package imports the nouns of
``tiers``, ``tiers.cache`` and ``tiers.store``.
"""
