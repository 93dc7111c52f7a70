"""Configuration of programs that drive a model of a server of moetier: opencode, pi, Codex and Claude Code.

``clients`` has the formats of each of them. ``server`` asks a server what it has, and estimates how long the first
prompt of a client takes. The package imports ``cli`` and ``plan``.
"""
