"""The quantiser that transformers calls: it removes the experts' parameters, and attaches the tiers.

transformers builds a model on the meta device, calls the quantiser, and loads the remaining parameters: the trunk.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moetier.runtime.checkpoint.config_json import NAME
from moetier.runtime.checkpoint.decoded_trunk import Trunk
from moetier.runtime.checkpoint.model_config import config_of, is_checkpoint
from moetier.runtime.config import TIER_OPTIONS, TierConfig, TierOptions
from moetier.runtime.libraries.model_building import BUILDING
from moetier.runtime.libraries.torch_internals import parameters_of
from moetier.runtime.libraries.transformers_internals import (
    ignore_weights,
    leave_out_of_plans,
    mark_initialised,
    set_experts_function,
    set_experts_function_alone,
)
from moetier.runtime.moe.experts import EXPERT_PARAMETERS, experts_forward, experts_modules
from moetier.runtime.moe.linear import replace_linears, replace_modules
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.errors import ConfigError, StoreFormatError, UnsafeCheckpointError, UnsupportedModelError
from moetier.tiers.manifest import FORMAT, TRUNK_NAME, Manifest
from moetier.tiers.store.folder import command
from moetier.tiers.store.trunk import check_small, check_trunk, trunk_records

from .attach import attach_tiers
from .trunk_files import TrunkFiles

_lock = threading.Lock()  # guards: ``_is_installed``; held while moetier is added to transformers' registries
_is_installed = False
IN_CONFIG = tuple(name for name, option in TIER_OPTIONS.items() if option.in_config)

_options: TierOptions = {}  # set by register(), for models that are loaded without load()


@dataclass(frozen=True)
class LoadArguments:
    """Options and files that load() hands to from_pretrained for one model."""

    config: TierConfig  # in place of the options in config.json
    location: Path  # its model directory, checkpoint folder or GGUF file
    files: TrunkFiles | None = None  # of a checkpoint, opened before anything was read from them
    trunk: Trunk | None = None  # given to from_pretrained as a state dict; None if it reads the files


_arguments: ContextVar[LoadArguments | None] = ContextVar("arguments", default=None)


@contextlib.contextmanager
def loading(arguments: LoadArguments) -> Iterator[None]:
    """In this context, load the model that ``arguments`` describe."""
    token = _arguments.set(arguments)
    try:
        yield
    finally:
        _arguments.reset(token)


def set_options(options: TierOptions) -> None:
    """Set the options of models that are loaded without load()."""
    global _options
    _options = options


def options() -> TierOptions:
    """Return the options of models that are loaded without load()."""
    return _options


def is_loading() -> bool:
    """Return whether load() is loading a model in this context."""
    return _arguments.get() is not None


def install() -> None:
    """Make moetier known to transformers. Idempotent."""
    global _is_installed
    with _lock:
        if _is_installed:
            return
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
        if NAME not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(NAME)(MoetierQuantizer)
        if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(NAME)(MoetierConfig)
        _build_alone()
        _is_installed = True  # only now, so that the next call completes what an exception has interrupted


def _build_alone() -> None:
    """Let transformers build models only while no engine of this process computes."""
    contexts: Any = PreTrainedModel.get_init_context.__func__  # type: ignore[attr-defined]  # a class method

    @functools.wraps(contexts)
    def get_init_context(cls: Any, *arguments: Any, **named: Any) -> list[Any]:
        return [BUILDING.building(), *contexts(cls, *arguments, **named)]

    PreTrainedModel.get_init_context = classmethod(get_init_context)  # type: ignore[assignment]


class MoetierConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model directory. A user may have added the options IN_CONFIG to it.

    Raises ConfigError for an unknown key, because a misspelt budget must not become the default.
    """

    def __init__(
        self,
        quant_method: str = NAME,
        format: int = FORMAT,
        bits: int | None = None,  # written by the converter, for users to see
        trunk_bits: int | None = None,  # as ``bits``
        **options: Any,
    ) -> None:
        if format != FORMAT:
            raise StoreFormatError(
                f"The model directory has format version {format}; this moetier reads version {FORMAT}.",
                "Install a version of moetier that reads it, or convert the model again.",
            )
        if unknown := options.keys() - set(IN_CONFIG):
            raise ConfigError(
                f"quantization_config in config.json has keys that moetier does not know: "
                f"{', '.join(map(repr, sorted(unknown)))}.",
                f"Add only {', '.join(IN_CONFIG)}, and keep the keys that the converter wrote.",
            )
        self.quant_method: Any = quant_method
        self.format = format
        for name in IN_CONFIG:
            setattr(self, name, options.get(name, TIER_OPTIONS[name].default))
        self.bits = bits
        self.trunk_bits = trunk_bits


class MoetierQuantizer(HfQuantizer):
    """Remove the experts' parameters before the weights are loaded, and attach the tiers afterwards."""

    requires_calibration = True  # it loads only models that moetier has converted

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self._location = _location_of(model, checkpoint_files)
        config_of(self._location)  # refuses what is unsafe
        arguments = _arguments.get()
        given = None if arguments is None else arguments.files
        # closed with this object if transformers raises between this method and the next: see ``TrunkFiles.close``
        self._files = given or TrunkFiles(self._location, list(map(Path, checkpoint_files or ())))
        with self._files.for_load():
            self._replace_modules(model, arguments)

    def _replace_modules(self, model: PreTrainedModel, arguments: LoadArguments | None) -> None:
        """Remove the experts' parameters, and give the trunk modules for its records. Raises StoreFormatError."""
        modules, records = experts_modules(model), dict[str, int]()
        # only now that the trunk's files are open: if the directory is replaced from now on, ``TrunkFiles`` notices
        self._manifest = manifest = read_manifest(self._location)
        if is_checkpoint(self._location):
            _ignore_experts(model, modules)
        else:
            check_trunk(self._location, manifest)
            check_small(self._location, manifest)
            records = trunk_records(self._location, manifest)
        self._check(model, modules, manifest)
        for path, module in modules.items():
            for name in EXPERT_PARAMETERS:
                parameters_of(module).pop(name, None)  # on the meta device, so nothing was allocated
            for touched in (module, model.get_submodule(path.rpartition(".")[0])):
                mark_initialised(touched)  # else _init_weights, in some models the parent's, would fill them
            set_experts_function_alone(module.config, NAME)
        if manifest.trunk_records is not None:
            replace_linears(model, records, manifest.trunk_records)
        if arguments is not None and arguments.trunk is not None:
            replace_modules(model, arguments.trunk.layouts)
        set_experts_function(model.config, NAME)
        leave_out_of_plans(model, ".experts")

    def _check(self, model: PreTrainedModel, modules: dict[str, Any], manifest: Manifest) -> None:
        """Check that the model's Experts modules match the store's blocks: the same paths, experts and shapes.

        Raises UnsupportedModelError if the model has no Experts modules, and StoreFormatError if they don't match.
        """
        if not modules:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no module with transformers' experts interface.",
                "Load the class that config.json names in architectures.",
            )
        blocks = {block.path: (number, block) for number, block in enumerate(manifest.blocks)}
        if strangers := sorted(modules.keys() ^ blocks.keys()):
            has, lacks = ("model", "store") if strangers[0] in modules else ("store", "model")
            raise StoreFormatError(
                f"{self._location} does not fit {type(model).__name__}: the {lacks} lacks the experts module "
                f"{strangers[0]}, which the {has} has.",
                "Load the class that config.json names in architectures, or convert the model again.",
            )
        for path, module in modules.items():
            number, block = blocks[path]
            layout = manifest.layout(number)
            stored = {p.name: p.shape for p in layout.projections} | {b.name: (b.size,) for b in layout.biases}
            expected = {
                name: tuple(p.shape[1:]) for name, p in parameters_of(module).items() if name in EXPERT_PARAMETERS
            }
            if stored != expected or block.experts != module.num_experts:
                raise StoreFormatError(
                    f"{self._location}: {path} has {block.experts} experts of {stored} in the store, "
                    f"and {module.num_experts} of {expected} in {type(model).__name__}.",
                    "Check that config.json belongs to this store, or convert the model again.",
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        given: Any = self.quantization_config
        in_config: Any = {name: getattr(given, name) for name in IN_CONFIG}
        arguments = _arguments.get()
        config = arguments.config if arguments else TierConfig.of(**(in_config | _options))
        with self._files.for_load():
            attach_tiers(model, self._location, self._manifest, self._files, config)
        return model

    def is_serializable(self) -> NoReturn:
        """Raise ConfigError: ``save_pretrained`` can't save the model, as its experts are not in memory."""
        raise ConfigError(
            f"The experts of this model are in {self._location}, and not in its parameters, so it can't be saved.",
            f"Copy {self._location}; or, to an object store: {command('push', self._location)} ADDRESS",
        )

    @property
    def is_trainable(self) -> bool:
        """False: there is no gradient through experts or quantised matrices."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: which experts are used is known only after the router has run."""
        return False


def _location_of(model: PreTrainedModel, files: list[str] | None) -> Path:
    """Return the folder of the model: its model directory, or the snapshot of a hub id.

    ``files`` is None if load() has given the trunk as a state dict. Raises UnsafeCheckpointError if ``files``, from
    which transformers will load the trunk, are not the trunk's files in that folder.
    """
    if files is None:
        given = _arguments.get()
        assert given is not None, "weights given as a state dict have no store"
        return given.location
    name = model.config.name_or_path
    location = Path(name) if name and Path(name).is_dir() else Path(files[0]).parent
    as_it_is = is_checkpoint(location)
    for file in map(Path, files):
        fits = file.suffix == ".safetensors" if as_it_is else TRUNK_NAME.fullmatch(file.name)
        if file.parent.resolve() != location.resolve() or not fits:
            raise UnsafeCheckpointError(
                f"{location} would load its trunk from {file}, which is not a trunk file in {location}.",
                "Don't use this model directory. Convert the model again.",
            )
    return location


def _ignore_experts(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Keep transformers from listing a checkpoint's experts as weights that the model does not use."""
    prefix, names = f"{model.base_model_prefix}.", "|".join(EXPERT_PARAMETERS)
    paths = "|".join(re.escape(path.removeprefix(prefix)) for path in modules)
    ignore_weights(model, rf"(^|\.)({paths})\.({names})$")
