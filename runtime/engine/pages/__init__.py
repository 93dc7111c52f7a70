"""Pages of keys and values of tokens, in memory and on disk.

- ``prefix_tree``: keys and values of earlier tokens in pages, and snapshots of other states, found by their token ids;
  ``free_pages``: pages that hold nothing.
- ``saved_pages``: pages and snapshots on disk; ``page_reader``: read before a sequence begins; ``page_writer``: written
  after it ends.
- ``page_folder``: the names of their files, and which are removed; ``page_file``: one file; ``page_binding``: what keys
  and values depend on.
"""
