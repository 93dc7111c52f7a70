"""The three tiers of experts: a store on disk, a cache in host memory, and a cache on a device.

The package imports neither models, gRPC nor transformers. The modules at its top level define what its subpackages
share: errors, the layout of a record, the manifest, the interface of a source of experts, statistics, and locks;
``options`` has the declaration of an option, for the packages of ``runtime`` and ``tools`` too.

``docs/glossary.md`` explains the terms: block, record, slot, trunk, demand, lease, load and so on.
"""
