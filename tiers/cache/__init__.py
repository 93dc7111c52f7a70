"""Which record a cache evicts, and how many slots each block of the model may hold.

All of it is pure: no bytes, no locks, no threads. The package imports only the nouns of ``tiers``.
"""
