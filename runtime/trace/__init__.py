"""Traces of routing decisions: their file format, their recording, and the recall of predictions.

Other packages use ``trace``, ``recorder`` and ``recall``. The package imports ``runtime.moe`` and ``tiers``.
"""
