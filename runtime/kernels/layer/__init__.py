"""Kernels for the rest of a decoder layer: attention, its cache, norms and routers.

    attend           attention of one or many tokens
    attention        replaces transformers' attention functions
    torch_attention  many tokens by torch, on processors with AMX
    attention_code   emits attention: strips of rows, and how their pieces are merged
    attention_piece  emits the attention of some rows to one piece
    attention_tasks  one token's attention as tasks, from the hidden state to the output projection
    heads            emits norms and rotation of queries and keys, and their place in a cache
    eight_bits       keys and values in 8 bits
    masks            which positions a mask of causal attention shows
    growing_cache    a KV cache that grows in place
    paged_cache      a KV cache in pages, which sequences share
    pages            the pages of a sequence
    packing          attention of several sequences, whose tokens are packed into one row
    norm             RMS norms: emits and runs them
    routing          a router's choice of experts for one token
    routing_code     emits it

Other packages use ``attend``, ``attention``, ``attention_tasks``, ``eight_bits``, ``growing_cache``, ``masks``,
``norm``, ``packing``, ``paged_cache`` and ``routing``. The package imports ``products``, ``jit`` and ``libraries``.
"""
