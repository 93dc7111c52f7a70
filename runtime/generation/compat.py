"""Differences between the minor versions of transformers that moetier works with: names that changed."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

_5_24 = Version(version("transformers")) >= Version("5.24.dev0")

# a model's argument, and the field of its output, for the cache of keys and values
CACHE = "cache" if _5_24 else "past_key_values"
# the method of the server's ModelManager that answers GET /v1/models
LIST_MODELS = "list_models" if _5_24 else "get_gen_models"
