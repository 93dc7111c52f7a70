"""Experts and bytes: the SSD store, the host tier, the device tier. Knows no model, no gRPC and no transformers."""
