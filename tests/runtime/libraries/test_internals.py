"""Private names of libraries: each is in the installed version, and is used in one module.

A failure names the line to change when a library is upgraded.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from places import ROOT
from transformers import modeling_utils
from transformers.integrations import moe
from transformers.quantizers import base
from transformers.utils import import_utils
from transformers.utils.chat_parsing import ResponseParser

from moetier.runtime.libraries.lean import TRIED

# the only modules that use private names of a library
HOMES = {
    "runtime/libraries/torch_internals.py": "torch",
    "runtime/libraries/lean.py": "torch",
    "runtime/libraries/transformers_internals.py": "transformers",
    "runtime/daemon/process.py": "grpc",
    "tools/ray/deploy.py": "ray",
}
LIBRARIES = ("torch", "transformers", "tokenizers", "grpc", "ray")
PRIVATE = re.compile(r"(\w+\.)*_[a-zA-Z]\w*(\.\w+)*")
# private names of Python's own library, and of gguf, whose types have no public list
OTHERS = {"_replace", "_fields", "_actions", "_action_groups", "_group_actions", "_option_string_actions", "_optionals",
          "_positionals", "_format_args", "_indent_increment", "_SubParsersAction", "_ArgumentGroup",
          "_ActionsContainer", "_StoreAction", "_choices_actions", "_type_traits"}  # fmt: skip
# names that are used with the releases of torch in TRIED only
OF_TRIED = {"torch._opaque_base", "torch._opaque_base.OpaqueBaseMeta", "_set_generator_metaclass"}
IS_TRIED = version("torch").startswith(TRIED)
# keys of a config.json, which are removed from it
KEYS_OF_FILES = {"runtime/checkpoint/config_json.py"}


def _source(owner: Any) -> str:
    return inspect.getsource(owner)


def _has_names(kind: Any, *names: str) -> Callable[[], bool]:
    return lambda: all(f"self.{name}" in _source(kind) for name in names)


def _imports(name: str) -> Callable[[], bool]:
    return lambda: bool(importlib.import_module(name))


def _attribute(module: str, name: str) -> Callable[[], bool]:
    return lambda: hasattr(importlib.import_module(module), name)


def _of_module(name: str) -> Callable[[], bool]:
    return lambda: isinstance(vars(torch.nn.Linear(1, 1))[name], dict)


CONFIG = transformers.PreTrainedConfig
MODEL = transformers.PreTrainedModel
# whether the installed library has a private name
CHECKS: dict[str, Callable[[], bool]] = {
    **{name: _of_module(name) for name in ("_parameters", "_buffers", "_modules")},
    **{name: _of_module(name) for name in ("_forward_hooks", "_forward_pre_hooks")},
    "_global_forward_hooks": _attribute("torch.nn.modules.module", "_global_forward_hooks"),
    "_global_forward_pre_hooks": _attribute("torch.nn.modules.module", "_global_forward_pre_hooks"),
    "torch.utils._pytree": _attribute("torch.utils._pytree", "tree_map_only"),
    "_C": lambda: hasattr(torch._C, "DisableTorchFunctionSubclass"),
    "_is_avx512_bf16_supported": lambda: isinstance(torch.cpu._is_avx512_bf16_supported(), bool),
    "_scaled_dot_product_flash_attention_for_cpu": lambda: hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    ),
    "_convert_weight_to_int4pack": lambda: hasattr(torch.ops.aten, "_convert_weight_to_int4pack"),
    "_weight_int4pack_mm": lambda: hasattr(torch.ops.aten, "_weight_int4pack_mm"),
    "torch._dynamo": lambda: all(
        hasattr(importlib.import_module("torch._dynamo"), name)
        for name in ("allow_in_graph", "assume_constant_result", "disable")
    ),
    "torch._meta_registrations": _imports("torch._meta_registrations"),
    "torch._dynamo._trace_wrapped_higher_order_op": _attribute(
        "torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex"
    ),
    "torch._opaque_base": _attribute("torch._opaque_base", "OpaqueBaseMeta"),
    "_set_generator_metaclass": lambda: hasattr(torch._C, "_set_generator_metaclass"),
    "_attn_implementation_internal": lambda: "_attn_implementation_internal" in vars(CONFIG()),
    "_experts_implementation_internal": lambda: "_experts_implementation_internal" in vars(CONFIG()),
    "_experts_implementation": lambda: isinstance(vars(CONFIG)["_experts_implementation"], property),
    "_is_quantized": lambda: "config._is_quantized = True" in _source(base),
    "_supports_sdpa": lambda: isinstance(MODEL._supports_sdpa, bool),
    "_supports_default_dynamic_cache": lambda: callable(transformers.GenerationMixin._supports_default_dynamic_cache),
    "_get_dtype_plan": lambda: [*inspect.signature(MODEL._get_dtype_plan).parameters] == ["self", "dtype"],
    "_is_hf_initialized": lambda: '"_is_hf_initialized"' in _source(modeling_utils),
    "_keys_to_ignore_on_load_missing": lambda: hasattr(MODEL, "_keys_to_ignore_on_load_missing"),
    "_keys_to_ignore_on_load_unexpected": lambda: hasattr(MODEL, "_keys_to_ignore_on_load_unexpected"),
    "_tp_plan": lambda: hasattr(MODEL, "_tp_plan"),
    "_ep_plan": lambda: hasattr(MODEL, "_ep_plan"),
    "_apply_gate": lambda: "_apply_gate" in _source(moe.use_experts_implementation),
    **{name: _has_names(ResponseParser, name) for name in ("_buffer", "_pos", "_current")},
    "_LazyModule": lambda: hasattr(import_utils, "_LazyModule"),
    **{
        name: _has_names(import_utils._LazyModule, name)
        for name in ("_class_to_module", "_modules", "_objects", "_object_missing_backend", "_import_structure")
    },
    "grpc._common": _attribute("grpc._common", "_LOGGER"),
    "_get_global_client": _attribute("ray.serve.context", "_get_global_client"),
}


class Use(NamedTuple):
    """A private name in a module's source."""

    path: str
    line: int
    name: str


def paths() -> list[str]:
    """Return the paths of all modules of the tree."""
    folders = ("tiers", "runtime", "tools")
    return [str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def nodes_of(path: str) -> list[ast.AST]:
    return [*ast.walk(ast.parse((ROOT / path).read_text()))]


@functools.cache
def own_names(path: str) -> set[str]:
    """Return the names that a module defines: of functions, classes, variables and attributes."""
    found = set[str]()
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@functools.cache
def all_own_names() -> set[str]:
    return set().union(*(own_names(path) for path in paths() if path not in HOMES))


def uses(path: str) -> Iterator[Use]:
    """The private names that a module does not define itself, as attributes, in imports and as strings."""
    for node in nodes_of(path):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        yield from (Use(path, node.lineno, name) for name in names if is_private(name) and name not in own_names(path))


def is_private(name: str) -> bool:
    return PRIVATE.fullmatch(name) is not None and "__" not in name


@pytest.mark.parametrize("use", [use for path in HOMES for use in uses(path)], ids=lambda use: f"{use.path}:{use.line}")
def test_the_installed_library_has_each_private_name(use: Use) -> None:
    library = HOMES[use.path]
    if library == "ray":
        pytest.importorskip("ray")
    if use.name in OF_TRIED and not IS_TRIED:
        pytest.skip(f"it is not used with torch {version('torch')}")
    name, check = use.name, CHECKS.get(use.name)
    assert check is not None, f"{use.path}:{use.line}: add a check of {name} to CHECKS"
    try:
        found = check()
    except Exception as error:
        found, name = False, f"{name} ({error!r})"
    package = {"grpc": "grpcio"}.get(library, library)
    assert found, f"{use.path}:{use.line}: {library} {version(package)} has no {name}"


def test_other_modules_use_no_private_name_of_a_library() -> None:
    found = []
    for path in set(paths()) - HOMES.keys():
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                if node.attr not in OTHERS and node.attr not in own_names(path) and foreign(node, path):
                    found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Constant) and node.value in CHECKS and path not in KEYS_OF_FILES:
                found.append(f"{path}:{node.lineno}: {node.value!r}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found += [f"{path}:{node.lineno}: {name}" for name in imported(node) if is_private_import(name)]
    assert not found, "\n".join(["use a function of runtime/libraries in place of:", *found])


def foreign(node: ast.Attribute, path: str) -> bool:
    """Whether no class of this project has the attribute, or the one that a library has is meant."""
    if node.attr not in all_own_names():
        return True
    return node.attr in CHECKS and not (isinstance(node.value, ast.Name) and node.value.id == "self")


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The absolute names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else []


def is_private_import(name: str) -> bool:
    return name.partition(".")[0] in LIBRARIES and any(part.startswith("_") for part in name.split("."))


def test_what_is_imported_from_libraries_is_there() -> None:
    """Also within functions, where a missing name would only show when it is used."""
    missing = []
    for path in paths():
        guarded = {
            inner
            for node in nodes_of(path)
            if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(each) for each in node.handlers)
            for inner in ast.walk(node)
        }
        for node in nodes_of(path):
            library = (getattr(node, "module", None) or "").partition(".")[0]
            if not isinstance(node, ast.ImportFrom) or node.level or library not in LIBRARIES or node in guarded:
                continue
            if library == "ray" and importlib.util.find_spec("ray") is None:
                continue
            missing += [
                f"{path}:{node.lineno}: {library} {version({'grpc': 'grpcio'}.get(library, library))} has no {name}"
                for name in imported(node)
                if not is_there(name) and (IS_TRIED or name not in OF_TRIED)
            ]
    assert not missing, "\n".join(missing)


def is_there(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute) or bool(importlib.import_module(name))
    except ImportError:
        return False
