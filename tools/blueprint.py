"""Which of a checkpoint's tensors make which expert, by transformers' own rules for loading it.

The model is built on the meta device, transformers' conversion mapping renames the checkpoint's keys, and what ends in
an Experts module is a *block*. Where the rules treat each expert alike (merging, stacking, transposing), the module's
parameters are cut to one expert and the rules are run for one expert at a time; else for a whole block.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from moetier.runtime.experts import EXPERT_PARAMETERS, experts_modules
from moetier.tiers.errors import CheckpointError, UnsupportedModelError

from .checkpoint import carried
from .dequantize import SourceTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")


@dataclass(frozen=True)
class Recipe:
    """How one parameter of an Experts module is made: the checkpoint's tensors by source pattern, and the operations.

    ``apart``: it can be made for one expert at a time.
    """

    model: PreTrainedModel  # on meta; ops look up the shape and type of what they make
    key: str  # what transformers calls the result (the first, when there are several)
    target: str  # the parameter's full name
    dtype: torch.dtype
    experts: int
    converter: loading.WeightConverter | None
    sources: Mapping[str, list[SourceTensor]]

    @property
    def apart(self) -> bool:
        operations = self.converter.operations if self.converter else []
        return all(map(_keeps_experts_apart, operations)) and all(
            len(tensors) == self.experts or (len(tensors) == 1 and tensors[0].shape[:1] == (self.experts,))
            for tensors in self.sources.values()
        )

    def make(self, expert: int | None) -> torch.Tensor:
        """One expert's slice, or with None the whole parameter [experts, ...]."""
        made = self._convert({pattern: self._read(tensors, expert) for pattern, tensors in self.sources.items()})
        wanted = self.model.get_parameter(self.target).shape
        if made.shape != wanted:
            raise CheckpointError(
                f"{self.target} comes out as {list(made.shape)} from this checkpoint; the model has {list(wanted)}.",
                "Check that config.json belongs to these weights.",
            )
        return (made if expert is None else made[0]).detach()

    def _read(self, tensors: list[SourceTensor], expert: int | None) -> list[torch.Tensor]:
        if expert is None or len(tensors) == self.experts == 1:
            read = [tensor.read() for tensor in tensors]
        elif len(tensors) == self.experts:
            read = [tensors[expert].read()]
        else:
            read = [tensors[0].read(expert, 1)]
        return [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in read]

    def _convert(self, read: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """Empties ``read`` on the way, so that no tensor lives longer than it must."""
        if self.converter is None:
            (tensors,) = read.values()
            return tensors[0]
        converter: Any = deepcopy(self.converter)
        converter.collected_tensors.update(read)
        read.clear()
        try:
            made = converter.convert(self.key, model=self.model, config=self.model.config)[self.target]
        except (ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{self.target} can't be made from this checkpoint ({error}).",
                "Check that config.json belongs to these weights.",
            ) from error
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor.to(self.dtype)


def _keeps_experts_apart(operation: loading.ConversionOps) -> bool:
    """Whether it does to each expert's slice of [experts, ...] what it does to the whole."""
    match operation:
        case loading.MergeModulelist():
            return operation.dim == 0
        case loading.Concatenate() | loading.Interleave():
            return operation.dim > 0
        case loading.Transpose():
            return operation.dim0 > 0 and operation.dim1 > 0
        case _:
            return False


@dataclass
class BlockBlueprint:
    """One Experts module. ``parameters``: name -> (shape of one expert's slice, dtype name), in module order."""

    path: str
    experts: int
    top_k: int
    transposed: bool
    parameters: Mapping[str, tuple[tuple[int, ...], str]]
    recipes: Mapping[str, Recipe]
    _whole: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def apart(self) -> bool:
        """Whether its experts are read one at a time; else the block is read whole, once."""
        return all(recipe.apart for recipe in self.recipes.values())

    def expert(self, index: int, turn: threading.Lock) -> Mapping[str, torch.Tensor]:
        """The slices of one expert, each made when it is looked up, under ``turn``, and kept by nobody."""
        return _Slices(self, index, turn)

    def slice(self, name: str, index: int) -> torch.Tensor:
        """Raises CheckpointError where a weight is not a finite number."""
        if self.recipes[name].apart:
            made = self.recipes[name].make(index)
        else:
            if name not in self._whole:
                self._whole[name] = self.recipes[name].make(None)
            made = self._whole[name][index]
        if not all(map(math.isfinite, torch.stack(made.aminmax()).tolist())):
            raise CheckpointError(
                f"{self.path} expert {index}: {name} has weights that are not finite numbers.",
                "Get an intact copy of the checkpoint.",
            )
        return made

    def forget(self) -> None:
        """Drops what was read whole."""
        self._whole.clear()


class _Slices(Mapping[str, torch.Tensor]):
    def __init__(self, block: BlockBlueprint, index: int, turn: threading.Lock) -> None:
        self._block = block
        self._index = index
        self._turn = turn

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._turn:
            return self._block.slice(name, self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._block.parameters)

    def __len__(self) -> int:
        return len(self._block.parameters)


@dataclass(frozen=True)
class Blueprint:
    """``trunk`` and ``unused`` name the checkpoint's other tensors: those that the model has, and those it ignores."""

    dtype: str  # the model's, torch's name
    blocks: tuple[BlockBlueprint, ...]
    trunk: tuple[str, ...]
    unused: tuple[str, ...]


def make_blueprint(model: PreTrainedModel, dtype: torch.dtype, tensors: Mapping[str, SourceTensor]) -> Blueprint:
    """Raises UnsupportedModelError or CheckpointError. ``model`` is on meta; its Experts modules are cut down."""
    modules = experts_modules(model)
    parameters = {
        f"{path}.{name}": parameter for path, module in modules.items() for name, parameter in _own(path, module)
    }
    dtypes = {name: _loaded_dtype(model, name, parameter.dtype, dtype) for name, parameter in parameters.items()}
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    recipes: dict[str, Recipe] = {}
    trunk: list[str] = []
    unused: list[str] = []
    names = sorted(tensors, key=loading.dot_natural_key)  # the order in which transformers merges
    for key, (converter, sources) in _group(names, mapping, state, model.base_model_prefix).items():
        targets = _targets(key, converter)
        made = [target for target in targets if target in parameters]
        members = [name for found in sources.values() for name in found]
        if not made:
            (trunk if any(target in state for target in targets) else unused).extend(members)
            continue
        if len(made) != len(targets):
            raise UnsupportedModelError(
                f"{members[0]} holds weights of experts and others at once.", "moetier can't take these apart yet."
            )
        for target in made:
            experts = parameters[target].shape[0]
            read = {pattern: [tensors[name] for name in found] for pattern, found in sources.items()}
            recipes[target] = Recipe(model, key, target, dtypes[target], experts, converter, read)
    if missing := sorted(parameters.keys() - recipes.keys()):
        raise CheckpointError(
            f"The checkpoint has nothing for {missing[0]}" + (f" and {len(missing) - 1} more." if missing[1:] else "."),
            "Download it again, or check that config.json belongs to these weights.",
        )
    blocks = tuple(
        BlockBlueprint(
            path=path,
            experts=module.num_experts,
            top_k=_top_k(model, path, module),
            transposed=module.is_transposed,
            parameters={
                name: (tuple(parameter.shape[1:]), str(dtypes[f"{path}.{name}"]).removeprefix("torch."))
                for name, parameter in _own(path, module)
            },
            recipes={name: recipes[f"{path}.{name}"] for name, _ in _own(path, module)},
        )
        for path, module in modules.items()
    )
    for path, module in modules.items():
        for name, parameter in _own(path, module):
            if recipes[f"{path}.{name}"].apart:
                one = torch.empty((1, *parameter.shape[1:]), dtype=parameter.dtype, device="meta")
                setattr(module, name, torch.nn.Parameter(one, requires_grad=False))
    return Blueprint(str(dtype).removeprefix("torch."), blocks, tuple(trunk), tuple(unused))


def _own(path: str, module: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters of an Experts module that hold one slice for each expert."""
    found = []
    for name, parameter in module.named_parameters(recurse=False):
        if name in EXPERT_PARAMETERS:
            found.append((name, parameter))
        elif parameter.shape[:1] == (module.num_experts,):
            raise UnsupportedModelError(
                f"{path} keeps {name} for each expert, which moetier does not know.",
                "This architecture is not supported yet.",
            )
    return found


def _group(
    names: list[str], mapping: list[Any], state: dict[str, Any], prefix: str
) -> dict[str, tuple[loading.WeightConverter | None, dict[str, list[str]]]]:
    """What each key of the model is made from, as transformers.core_model_loading collects it: key -> (converter,
    source pattern -> checkpoint names). Keys that the model does not have are there too."""
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, tuple[loading.WeightConverter | None, dict[str, list[str]]]] = {}
    for name in names:
        key, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = loading.rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        converter = None if pattern is None else by_pattern[pattern]
        _, sources = groups.setdefault(key, (converter, defaultdict(list)))
        sources[name if pattern is None else pattern].append(name)
    return groups


def _targets(key: str, converter: loading.WeightConverter | None) -> list[str]:
    if converter is None:
        return [key]
    first, *others = converter.target_patterns
    return [key, *(key.replace(first, other) for other in others)]


def _loaded_dtype(model: PreTrainedModel, name: str, own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type that from_pretrained gives a parameter: some models keep a few in fp32."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        pattern, by_group, _ = loading.build_glob_alternation(list(plan))
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            kept: torch.dtype = plan[by_group[match.lastgroup]]
            return kept
    return own


def _top_k(model: PreTrainedModel, path: str, module: Any) -> int:
    """How many experts a token is sent to: from the modules beside the experts, else from the config."""
    parent = model.get_submodule(path.rpartition(".")[0])
    for owner in (parent, *(child for child in parent.children() if child is not module), module.config):
        for name in TOP_K:
            value = getattr(owner, name, None)
            if isinstance(value, int) and 1 <= value <= module.num_experts:
                return value
    raise UnsupportedModelError(
        f"{path}: its config does not say how many experts a token is sent to.", "This architecture is not supported."
    )


def build_on_meta(config: Mapping[str, Any], first_dtype: str | None) -> tuple[PreTrainedModel, torch.dtype]:
    """The class that ``architectures`` names, without weights, and the type that from_pretrained would load it in:
    the config's, else ``first_dtype`` (of the checkpoint's first tensor of floats). Code of the checkpoint's own is
    never run."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    architecture = str((config.get("architectures") or [None])[0])
    made_by = getattr(transformers, architecture, None)
    if not (isinstance(made_by, type) and issubclass(made_by, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"This transformers ({transformers.__version__}) has no architecture {architecture} "
            f"(model type {model_type}).",
            f"Supported model types: {', '.join(supported_types())}.",
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
    except Exception as error:  # whatever a config that does not fit makes transformers raise
        raise CheckpointError(
            f"transformers can't build {architecture} from this config.json "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}).",
            "Check that config.json is whole and of a version that transformers reads.",
        ) from error
    if not experts_modules(model):
        raise UnsupportedModelError(
            f"{architecture} (model type {model_type}) is dense, or transformers' experts interface does not know "
            "its experts.",
            f"Supported model types: {', '.join(supported_types())}.",
        )
    return model, dtype


def _with_floats(config: Mapping[str, Any]) -> Any:
    """With infinities and NaNs, which JSON lacks and transformers writes as {"__float__": "Infinity"}."""
    tag = {"__float__"}
    return json.loads(json.dumps(config), object_hook=lambda d: float(d["__float__"]) if d.keys() == tag else d)


def supported_types() -> list[str]:
    """Model types whose modelling file uses the experts interface."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    return sorted(
        {f.parent.name for f in folder.glob("*/modeling_*.py") if "@use_experts_implementation" in f.read_text("utf-8")}
    )
