"""The memory of the host tier: a memory file with slots for records, and a directory of the record in each slot.

Clients of a daemon map the file too. If the process that owns the file dies, another process can take the file over.
The package imports the top-level modules of ``tiers``, ``tiers.cache`` and ``tiers.store``.
"""
