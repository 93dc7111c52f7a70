"""Large libraries: their private names, one module for each library, and how they are loaded.

    lean                    imports them without the parts that moetier never uses
    model_building          builds models on the meta device, and not while others compute
    torch_variables         sets variables that torch reads when it is loaded
    torch_internals         private names of torch
    transformers_internals  private names of transformers

Other packages may use all. ``lean`` and ``torch_variables`` do not import torch. The package imports nothing of
moetier.
"""
