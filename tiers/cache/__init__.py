"""Choice of the record that a tier evicts next, and of the number of slots for the records of each block.

The package holds no records, takes no locks and starts no threads. It imports only the top-level modules of ``tiers``.
"""
