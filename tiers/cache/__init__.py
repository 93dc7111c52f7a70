"""Choice of the records that a cache evicts, and of the number of slots that each block of the model may hold.

All of it is pure: no bytes, no locks, no threads. The package imports only the nouns of ``tiers``.
"""
