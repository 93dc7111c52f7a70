"""Kernels for the rest of a decoder layer: attention of one token, its cache, norms and routers.

Others use ``attention``, ``attention_tasks``, ``growing_cache``, ``norm`` and ``routing``. Imports ``products`` and
``jit``.
"""
