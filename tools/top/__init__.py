"""``moetier top``: a live view of the daemons on this machine. Textual is imported only here.

The package imports ``cli`` and ``runtime.wire``.
"""
