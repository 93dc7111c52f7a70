"""Experts and their bytes, in three tiers: a store on disk, a cache in host memory, a cache on a device.

The package knows no model, no gRPC and no transformers. Its own modules define what the others share: errors, the
layout of a record, the manifest, the interface of a source of experts, statistics, and the monitor of a tier.
"""
