"""The engine: computes the answers of many requests with one model, step by step.

- ``sequence``: a *request*: one prompt, and how it is to be continued; and the sequence of tokens that answers it.
- ``pages``: pages of keys and values, in memory and on disk; it knows no sequences.
- ``kv_cache``: the pages of each running sequence, within a budget; ``page_fetch``: brings those on disk for the
  sequence that waits first.
- ``scheduler``: chooses what the next step computes; ``steps``: a step: admit, schedule, run.
- ``runner``: the interface of what computes a step; ``model_runner``: one sequence at a time, for any architecture;
  ``packed_runner``: tokens of several sequences in one forward pass; ``faster_way``: whether that is faster.
- ``sampling``: chooses the next token of a sequence from its logits.
- ``grammar``: what an answer may be; ``type_schema``: JSON schemas of Python types; ``constraint``: leaves only the
  tokens that a grammar allows.
- ``engine``: takes requests, and has the thread of the steps; ``stream``: the tokens of an answer, as they are sampled.
"""
