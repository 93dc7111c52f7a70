"""Names that changed between the versions of transformers that moetier supports.

All of them are in this module, so that only this module changes when a new version is to be supported.
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

_5_24 = Version(version("transformers")) >= Version("5.24.dev0")

# name of the KV cache, as an argument of a model and as a field of its output
CACHE = "cache" if _5_24 else "past_key_values"
