"""Which record a tier evicts next, and how many slots the records of each block may take.

The package holds no records, takes no locks and starts no threads. It imports only the top-level modules of ``tiers``.
"""
