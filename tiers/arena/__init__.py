"""The memory of the host tier: one file with slots for records, and a directory of which record is in which slot.

Other processes, the clients of a daemon, can map the file. If its owner dies, a new owner can take it over. The package
imports the top-level modules of ``tiers``, ``tiers.cache`` and ``tiers.store``.
"""
