"""The memory of the host cache: one file that other processes may map, and the directory of what lies in it.

Clients map an arena without a host tier. An owner takes back what a dead one left. The package imports
``tiers.store`` and the nouns.
"""
