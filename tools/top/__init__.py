"""``moetier top``: a live view of a daemon.

The package imports ``cli`` and ``runtime.wire``. No other package imports Textual.
"""
