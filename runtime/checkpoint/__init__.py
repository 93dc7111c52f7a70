"""Read a Hugging Face checkpoint or GGUF file: its files, its weights (never all at once), and which are experts.

    containers          opens a path
    safetensors_folder  a folder with safetensors files
    gguf_file           a GGUF file
    hub                 downloads from the hub
    config_json         checks config.json of a model directory
    model_config        the config of a model, whether converted or not
    blueprint, recipe   which tensors make which expert, and how
    native              layouts that keep weights as the checkpoint stores them
    extents             the table of a checkpoint that is used as it is
    matrices            which matrices of the trunk may become records
    decoded_trunk       the trunk of a checkpoint that transformers can't read from the files

``runtime.formats`` says how weights are stored. The package imports ``runtime.formats``, ``runtime.moe`` and ``tiers``.
Of its modules, ``config_json``, ``hub``, ``safetensors_folder`` and ``containers`` import torch only when needed.
"""
