"""Decide which records a cache evicts, and how many slots each block of the model may hold.

The package holds no records, takes no locks and starts no threads. It imports only the top-level modules of ``tiers``.
"""
