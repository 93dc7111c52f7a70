"""Experts and their bytes, in three tiers: a store on disk, a cache in host memory, a cache on a device.

This package knows no model, no gRPC and no transformers. Its own modules are the nouns that the others share: errors,
the layout of a record, the manifest, the interface of a source of experts, counters, and the lock of a tier.
"""
