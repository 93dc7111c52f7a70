"""Conversion of a checkpoint into a model directory, block by block, also while the checkpoint is downloaded.

    api              ``moetier.convert`` and ``moetier.pull``: open the source, and make or replace the model directory
    options          its options
    conversion_plan  what is made, and in which order
    conversion       one conversion, block after block, and its report
    encoder          turns the weights of experts into records, on threads
    trunk_writer     writes the trunk's files, and quantises its matrices
    target           the folder to write, or to resume
    replacement      replaces a complete model
    streaming        downloads from the hub meanwhile
    mirror_writer    makes a mirror
    model_card       README.md of a model
    model_files      removes and measures files of a model directory

Other packages may use every module except ``streaming``. The package imports ``cli``, ``runtime`` and ``tiers``.
"""
