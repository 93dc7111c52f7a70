"""The storage daemon: serves experts of one or several models to inference processes on this and other machines.

``entry`` starts the daemon. The package imports ``runtime.wire``, ``tiers`` and a few modules of ``runtime``, but
neither torch nor transformers.
"""
