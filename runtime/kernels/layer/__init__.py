"""Kernels for the rest of a decoder layer: attention of one token, its cache, norms and routers.

Other packages use ``attention``, ``attention_tasks``, ``growing_cache``, ``norm`` and ``routing``. The package imports
``products`` and ``jit``.
"""
