"""Blueprint of a conversion: which of a checkpoint's tensors make which expert, by transformers' own rules.

The model that a config names is built without weights, on the meta device. transformers' conversion mapping renames the
checkpoint's keys to the model's. The parameters of an Experts module form a *block*; the model's other parameters are
its trunk.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moetier.runtime.formats.tensors import SourceTensor
from moetier.runtime.libraries.lean import made_on_meta
from moetier.runtime.libraries.transformers_internals import dtype_plan_of, may_lack
from moetier.runtime.moe.experts import EXPERT_PARAMETERS, experts_modules
from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError, UnsupportedModelError
from moetier.tiers.layout import RecordLayout
from moetier.tiers.manifest import Block
from moetier.tiers.store.trunk import RECORD
from moetier.tiers.text import some

from .config_json import carried, with_floats
from .recipe import BlockBlueprint, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")
# tensors of a checkpoint that transformers reads together: the converter, and names by its source patterns
_Origin = tuple[loading.WeightConverter | None, dict[str, list[str]]]
MAX_LAYERS = 1000  # most layers of a model or of a part of it; Llama 3.1 405B has 126


def build_on_meta(config: Mapping[str, Any], first_dtype: str | None) -> tuple[PreTrainedModel, torch.dtype]:
    """Build the model that ``config`` describes, on the meta device; return it and the type in which it is loaded.

    The class is the one that ``architectures`` names. The type is the one that from_pretrained would choose: the
    config's, or else ``first_dtype``, the type of the checkpoint's first floating-point tensor. Code in the checkpoint
    is never run.

    Raises UnsupportedModelError if transformers lacks the class or does not know its experts, and CheckpointError if
    the model can't be built from ``config``.
    """
    _check_depth(config)
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
        own_config = CONFIG_MAPPING[model_type].from_dict(with_floats(carried(config)))
        dtype = getattr(own_config, "dtype", None) or first_dtype or "float32"
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        own_config.dtype = dtype
        for name in own_config.sub_configs:
            if (part := getattr(own_config, name)) is not None:
                part.dtype = dtype
        with contextlib.ExitStack() as closing:
            closing.enter_context(made_on_meta())
            for context in made_by.get_init_context(dtype, False, False, False):
                closing.enter_context(context)
            model = made_by(own_config)
    except Exception as error:  # for a config that does not fit, transformers may raise any error
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


def _check_depth(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a model or a part of it would have more than MAX_LAYERS layers: each takes memory."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(value)
        elif name.endswith("layers") and isinstance(value, int) and value > MAX_LAYERS:
            raise CheckpointError(
                f"By its config, the model has {value:,} layers ({name}). moetier reads at most {MAX_LAYERS:,}.",
                DOWNLOAD_AGAIN,
            )


def _supported() -> str:
    return (
        f"Choose another model. moetier runs models of {len(supported_types())} types, such as mixtral, qwen3_moe and "
        "gpt_oss; docs/architectures.md lists them."
    )


def supported_types() -> list[str]:
    """Return the model types whose modelling file uses the experts interface."""
    folder = Path(transformers.__file__).parent / "models"
    return sorted(
        {f.parent.name for f in folder.glob("*/modeling_*.py") if "@use_experts_implementation" in f.read_text("utf-8")}
    )


@dataclass(frozen=True)
class Blueprint:
    """Blocks and trunk of a checkpoint.

    ``trunk`` names the tensors of the trunk, and ``unused`` the tensors that the model ignores. ``matrices`` is a
    dictionary from modules' paths to the recipes of the trunk's weights that become records instead of trunk tensors.
    """

    dtype: str  # of the model, by torch's name
    blocks: tuple[BlockBlueprint, ...]
    trunk: tuple[str, ...]
    unused: tuple[str, ...]
    matrices: Mapping[str, Recipe]


def make_blueprint(
    model: PreTrainedModel, dtype: torch.dtype, tensors: Mapping[str, SourceTensor], as_records: Collection[str] = ()
) -> Blueprint:
    """Make the blueprint of ``model``, which is on the meta device.

    Parameters of its Experts modules that can be made for one expert at a time are cut down to one expert, [1, ...].

    Args:
        model: the model.
        dtype: the type in which it is loaded.
        tensors: a dictionary from names to the checkpoint's tensors.
        as_records: paths of linear modules whose weights become records, where that is possible.

    Raises:
        UnsupportedModelError: the experts have parameters that moetier does not know.
        CheckpointError: the checkpoint lacks tensors.
    """
    modules = experts_modules(model)
    parameters = {
        f"{path}.{name}": parameter for path, module in modules.items() for name, parameter in _own(path, module)
    }
    dtypes = {name: loaded_dtype(model, name, parameter.dtype, dtype) for name, parameter in parameters.items()}
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    # in the order in which transformers merges
    origins = _origins(sorted(tensors, key=loading.dot_natural_key), mapping, state, model.base_model_prefix)
    sorting = _Sorting(model, dtype, tensors, origins, _loadable(as_records, mapping, state, model.base_model_prefix))
    sorting.add_tied()
    for key in origins:
        sorting.add(key, state, parameters, dtypes)
    recipes = sorting.recipes
    if lacking := _lacking(model, state, origins):
        raise CheckpointError(
            f"The checkpoint has no tensor for {some(lacking)}.",
            "Download the checkpoint again, or check that config.json belongs to these weights.",
        )
    blocks = tuple(_block(model, path, module, dtypes, recipes) for path, module in modules.items())
    for path, module in modules.items():
        _cut_down(path, module, recipes)
    trunk, unused = tuple(sorting.trunk), tuple(sorting.unused)
    return Blueprint(str(dtype).removeprefix("torch."), blocks, trunk, unused, sorting.matrices)


def _lacking(model: PreTrainedModel, state: Mapping[str, Any], origins: Mapping[str, _Origin]) -> list[str]:
    """Return the keys of ``state`` that the model needs and that no tensor makes.

    ``state``: the tensors of ``model``. Weights that are tied need only one tensor.
    """
    made = {target for key, (converter, _) in origins.items() for target in _targets(key, converter)}
    tied = model.all_tied_weights_keys
    for source in set(tied.values()):
        alike = {source, *(target for target in tied if tied[target] == source)}
        made |= alike if made & alike else set()
    return [key for key in state if key not in made and not may_lack(model, key)]


@dataclass
class _Sorting:
    """Sorts a checkpoint's tensors: experts, matrices that become records, and other tensors of the trunk."""

    model: PreTrainedModel
    dtype: torch.dtype  # in which the model is loaded
    tensors: Mapping[str, SourceTensor]
    origins: Mapping[str, _Origin]  # by the model's key
    weights: Mapping[str, str]  # from weights that may become records to the paths of their modules
    recipes: dict[str, Recipe] = field(default_factory=dict)  # of parameters of experts
    matrices: dict[str, Recipe] = field(default_factory=dict)  # of records, by the path of the module
    trunk: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tied = self.model.all_tied_weights_keys
        self._tied = {target: source for target, source in tied.items() if target in self.weights}

    def add_tied(self) -> None:
        """Give a tied head a record of its own, besides the embedding, which stays in the trunk."""
        for target, source in self._tied.items():
            if target not in self.origins and source in self.origins and _is_plain(self.origins[source]):
                self.matrices[self.weights[target]] = self._recipe(source, source)

    def add(
        self,
        key: str,
        state: Mapping[str, Any],
        parameters: Mapping[str, torch.nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Assign the tensors behind the model's ``key`` to experts, trunk or unused.

        ``state``: the tensors of the model. ``parameters``, ``dtypes``: those of the experts, and the types in which
        they are loaded. Raises UnsupportedModelError if one tensor feeds both experts and trunk.
        """
        converter, sources = self.origins[key]
        targets = _targets(key, converter)
        members = [name for names in sources.values() for name in names]
        alone = all(target in self.weights and self._tied.get(target, key) in self.origins for target in targets)
        of_experts = [target for target in targets if target in parameters]
        if alone and (converter is not None or _is_plain(self.origins[key])):
            self.matrices |= {self.weights[target]: self._recipe(key, target) for target in targets}
        elif not of_experts:
            (self.trunk if any(target in state for target in targets) else self.unused).extend(members)
        elif len(of_experts) != len(targets):
            raise UnsupportedModelError(f"{members[0]} holds weights of experts and of the trunk.", _supported())
        else:
            for target in of_experts:
                self.recipes[target] = self._recipe(key, target, dtypes[target], parameters[target].shape[0])

    def _recipe(self, key: str, target: str, dtype: torch.dtype | None = None, experts: int = 1) -> Recipe:
        converter, sources = self.origins[key]
        read = {pattern: [self.tensors[name] for name in names] for pattern, names in sources.items()}
        return Recipe(self.model, key, target, dtype or self.dtype, experts, converter, read)


def _block(
    model: PreTrainedModel, path: str, module: Any, dtypes: Mapping[str, torch.dtype], recipes: Mapping[str, Recipe]
) -> BlockBlueprint:
    """Return the blueprint of the Experts module at ``path``."""
    return BlockBlueprint(
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


def _cut_down(path: str, module: Any, recipes: Mapping[str, Recipe]) -> None:
    """Cut parameters of an Experts module that can be made for one expert at a time down to one expert, [1, ...]."""
    for name, parameter in _own(path, module):
        if recipes[f"{path}.{name}"].is_separable:
            one = torch.empty((1, *parameter.shape[1:]), dtype=parameter.dtype, device="meta")
            setattr(module, name, torch.nn.Parameter(one, requires_grad=False))


def records_of(
    blueprint: Blueprint, layout_of: Callable[[BlockBlueprint], RecordLayout]
) -> tuple[tuple[Block, ...], dict[str, RecordLayout]]:
    """Return the blocks of a manifest, and a dictionary from the names of zarr arrays to their record layouts.

    ``layout_of`` returns the layout of a block's records.
    """
    arrays: dict[tuple[RecordLayout, int], str] = {}
    sizes: dict[str, int] = {}
    blocks = []
    for block in blueprint.blocks:
        layout = layout_of(block)
        name = f"records-{len(arrays) + 1}" if arrays else "records"
        array = arrays.setdefault((layout, block.experts), name)
        index = sizes.get(array, 0)
        sizes[array] = index + 1
        blocks.append(Block(block.path, array, index, block.experts, block.top_k))
    return tuple(blocks), {name: layout for (layout, _), name in arrays.items()}


def destinations(model: PreTrainedModel, names: Iterable[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield pairs: names of tensors that transformers reads together, and the keys of the model that result.

    The model may not have all of these keys.
    """
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    origins = _origins(sorted(names, key=loading.dot_natural_key), mapping, state, model.base_model_prefix)
    for key, (converter, sources) in origins.items():
        yield [name for of_pattern in sources.values() for name in of_pattern], _targets(key, converter)


def _loadable(as_records: Collection[str], mapping: list[Any], state: dict[str, Any], prefix: str) -> dict[str, str]:
    """Return a dictionary from weights to the paths of the ``as_records`` modules whose weights may become records.

    A weight may become a record only if transformers, which renames a checkpoint's keys, keeps the record's key.
    """
    records = {f"{path}{RECORD}": path for path in as_records}
    others = {name: tensor for name, tensor in state.items() if name not in {f"{path}.weight" for path in as_records}}
    origins = _origins(list(records), mapping, others | dict.fromkeys(records, True), prefix)
    return {
        f"{records[key]}.weight": records[key]
        for key, (converter, sources) in origins.items()
        if converter is None and list(sources) == [key]
    }


def _is_plain(origin: _Origin) -> bool:
    """Return whether a key is one unchanged tensor of the checkpoint."""
    converter, sources = origin
    return converter is None and sum(map(len, sources.values())) == 1


def _own(path: str, module: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters of an Experts module that hold a slice for each expert.

    Raises UnsupportedModelError if moetier does not know one of them.
    """
    parameters = []
    for name, parameter in module.named_parameters(recurse=False):
        if name in EXPERT_PARAMETERS:
            parameters.append((name, parameter))
        elif parameter.shape[:1] == (module.num_experts,):
            raise UnsupportedModelError(f"{path} has an unknown expert parameter {name}.", _supported())
    return parameters


def _origins(names: list[str], mapping: list[Any], state: dict[str, Any], prefix: str) -> dict[str, _Origin]:
    """Group the checkpoint's tensors by the model's key that they make, as transformers.core_model_loading does.

    Returns a dictionary from keys to pairs: the converter, and a dictionary from its source patterns to names of
    tensors. Keys that the model does not have are included.
    """
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    origins: dict[str, _Origin] = {}
    for name in names:
        key, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = loading.rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        converter = None if pattern is None else by_pattern[pattern]
        _, sources = origins.setdefault(key, (converter, defaultdict(list)))
        sources[name if pattern is None else pattern].append(name)
    return origins


def _targets(key: str, converter: loading.WeightConverter | None) -> list[str]:
    if converter is None:
        return [key]
    first, *others = converter.target_patterns
    return [key, *(key.replace(first, other) for other in others)]


def loaded_dtype(model: PreTrainedModel, name: str, own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which from_pretrained loads a parameter. Some models keep a few parameters in fp32."""
    if plan := dtype_plan_of(model, dtype):
        pattern, by_group, _ = loading.build_glob_alternation(list(plan))
        if (match := pattern.search(name)) is not None and match.lastgroup is not None:
            return plan[by_group[match.lastgroup]]
    return own


def _top_k(model: PreTrainedModel, path: str, module: Any) -> int:
    """Return the number of experts for each token, as a module beside the experts or the config states it."""
    parent = model.get_submodule(path.rpartition(".")[0])
    for owner in (parent, *(child for child in parent.children() if child is not module), module.config):
        for name in TOP_K:
            value = getattr(owner, name, None)
            if isinstance(value, int) and 1 <= value <= module.num_experts:
                return value
    raise UnsupportedModelError(f"The config does not say how many experts of {path} a token uses.", _supported())
