"""Large libraries: their private names, one module for each library, and how they are loaded.

Other packages use ``torch_internals`` and ``transformers_internals`` in place of private names, ``meta`` to build a
model without memory, ``torch_stand_ins`` before torch is imported, and ``torch_variables``. The package imports nothing
of moetier.
"""
