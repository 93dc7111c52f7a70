"""Experts and their bytes, in three tiers: a store on disk, a cache in host memory, a cache on a device.

The package knows no model, no gRPC and no transformers. The modules at its top level define what its subpackages share:
errors, the layout of a record, the manifest, the interface of a source of experts, statistics, and the lock of a tier.
"""
