"""The digest of all that keys and values depend on besides the tokens: pages with another one are never found."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

import moetier
from moetier.runtime.libraries.transformers_internals import attention_of
from moetier.tiers.manifest import Manifest

CODE = ("runtime", "tiers")  # what computes, and what reads weights
NAMES_OF_PLACES = ("_name_or_path", "name_or_path")  # in a config: the same model may lie elsewhere


def binding_of(model: Any, manifest: Manifest) -> bytes:
    """Return the digest for a model with tiers.

    It covers the weights of experts and trunk, positions and all else in the config, the types of numbers, the code
    that computes, the libraries, and the processor, whose instructions may round differently.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in NAMES_OF_PLACES}
    parts = (
        repr(manifest),
        json.dumps(config, sort_keys=True, default=str),
        repr((model.dtype, model.tiers.kv.bits, attention_of(model.config), type(model.tiers.kernels).__name__)),
        repr(
            sorted(
                {
                    (type(part).__name__, getattr(part, "same_bits", False))
                    for part in (*model.parameters(), *model.modules())
                }
            )
        ),
        repr((torch.__version__, transformers.__version__)),
        repr((torch.backends.cpu.get_cpu_capability(), str(model.tiers.kernels.processor))),
        digest_of_code(),
    )
    return hashlib.sha256(json.dumps(parts).encode()).digest()


@functools.cache
def digest_of_code() -> str:
    """Return a digest of the modules that compute keys and values. So nothing has to be told when one changes."""
    digest, top = hashlib.sha256(), Path(moetier.__file__).parent
    for package in CODE:
        for path in sorted((top / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
