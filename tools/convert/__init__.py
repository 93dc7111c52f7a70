"""Conversion of a checkpoint into a model directory, block by block, also while the checkpoint is downloaded.

Other packages may use every module except ``streaming``. The package imports ``cli``, ``runtime`` and ``tiers``.
"""
