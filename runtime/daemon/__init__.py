"""The storage daemon: serves experts of one or several models to inference processes on this and other machines.

``entry`` starts it. The package imports ``runtime.wire`` and ``tiers``, and neither torch nor a model.
"""
