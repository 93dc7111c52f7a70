"""Build the model that a config names, without weights, on the meta device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetier.runtime.moe.experts import experts_modules
from moetier.tiers.errors import CheckpointError, UnsupportedModelError

from .files import carried

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_on_meta(config: Mapping[str, Any], first_dtype: str | None) -> tuple[PreTrainedModel, torch.dtype]:
    """Return the model of the class that ``architectures`` names, and the type in which from_pretrained loads it.

    That is the config's type, or else ``first_dtype``, of the checkpoint's first tensor of floats. Code that the
    checkpoint brings is never run. Raises UnsupportedModelError or CheckpointError.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    architecture = str((config.get("architectures") or [None])[0])
    made_by = getattr(transformers, architecture, None)
    if not (isinstance(made_by, type) and issubclass(made_by, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"This transformers ({transformers.__version__}) has no architecture {architecture} "
            f"(model type {model_type}).",
            _supported(),
        )
    try:
        made = CONFIG_MAPPING[model_type].from_dict(_with_floats(carried(config)))
        dtype = getattr(made, "dtype", None) or first_dtype or "float32"
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        made.dtype = dtype
        for name in made.sub_configs:
            if (part := getattr(made, name)) is not None:
                part.dtype = dtype
        with contextlib.ExitStack() as stack:
            for context in made_by.get_init_context(dtype, False, False, False):
                stack.enter_context(context)
            model = made_by(made)
    except Exception as error:  # transformers raises anything for a config that does not fit
        raise CheckpointError(
            f"transformers can't build {architecture} from this config.json "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}).",
            "Check that config.json is whole and of a version that transformers reads.",
        ) from error
    if not experts_modules(model):
        raise UnsupportedModelError(
            f"{architecture} (model type {model_type}) is dense, or transformers' experts interface does not know "
            "its experts.",
            _supported(),
        )
    return model, dtype


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError or CheckpointError for a config whose model can't be converted."""
    build_on_meta(config, None)


def _with_floats(config: Mapping[str, Any]) -> Any:
    """Return the config with infinities and NaNs, which transformers writes as {"__float__": "Infinity"}."""
    tag = {"__float__"}
    return json.loads(json.dumps(config), object_hook=lambda d: float(d["__float__"]) if d.keys() == tag else d)


def _supported() -> str:
    return (
        f"moetier runs Mixture-of-Experts models of {len(supported_types())} types, mixtral, qwen3_moe and gpt_oss "
        "among them; docs/architectures.md lists all."
    )


def supported_types() -> list[str]:
    """Return the model types whose modelling file uses the experts interface."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    return sorted(
        {f.parent.name for f in folder.glob("*/modeling_*.py") if "@use_experts_implementation" in f.read_text("utf-8")}
    )
