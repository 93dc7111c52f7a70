"""Kernels for the rest of a decoder layer: attention of one token, its cache, norms and routers.

    attention        one token's attention: chooses the code, and replaces transformers' function
    attention_code   emits it
    attention_tasks  one token's attention as tasks, from the hidden state to the output projection
    heads            emits norms and rotation of queries and keys, and their place in a cache
    growing_cache    a KV cache that grows in place
    paged_cache      a KV cache in pages, which sequences share
    packing          attention of several sequences, whose tokens are packed into one row
    norm             RMS norms: emits and runs them
    routing          a router's choice of experts for one token
    routing_code     emits it

Other packages use ``attention``, ``attention_tasks``, ``growing_cache``, ``norm``, ``packing``, ``paged_cache`` and
``routing``. The package imports
``products`` and ``jit``.
"""
