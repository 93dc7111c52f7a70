"""Commands import little, and models are made as they are made without that (``runtime.libraries.lean``)."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from architectures import TYPES, model_class, tiny_config
from places import HELPERS

import moetier
from moetier.runtime.libraries.lean import TRIED, lean_imports, made_on_meta, put_stand_ins, remove_stand_ins

UNUSED = {
    *("hqq", "networkx", "pandas", "peft", "scipy", "sklearn", "sympy", "torchvision", "triton"),
    *(() if torch.cuda.is_available() else ("accelerate", "boto3")),
    *("torch._dynamo.utils", "torch._inductor.utils", "torch.distributed.tensor", "torch.nn.attention.flex_attention"),
    *("torch.fx.experimental.symbolic_shapes", "grpc", "zarr", "obstore", "ray"),
    *(("torch._prims",) if torch.__version__.startswith(TRIED) else ()),
}
MOST = 250 << 20  # bytes, with a CPU build of torch; 209 MiB on an EPYC with torch 2.13 and transformers 5.24


def run(code: str, *words: str, **variables: str) -> str:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables).stdout


GENERATE = """
import re, sys
from pathlib import Path
searched = set()
sys.addaudithook(lambda event, given: searched.add(str(given[0])) if event in ("os.listdir", "os.scandir") else None)
from moetier.tools.main import main
command = ["generate", sys.argv[1], "Il vecchio", "--max-new-tokens", "8", "--temperature", "0", "--json"]
assert main([*command, "--daemon", "none"]) == 0
rollup = Path("/proc/self/smaps_rollup").read_text()
print(int(re.search(r"Anonymous: +(\\d+) kB", rollup)[1]) * 1024)
print(*sys.modules)
print(sum(Path(folder).parent.match("transformers/models") for folder in searched))
from transformers.utils.import_utils import is_torch_distributed_available as has_distributed
print(has_distributed(), type(sys.modules["torch._dynamo"]).__name__)
import torch  # its compiler is there when it is used
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    found = torch.vmap(lambda index: torch.arange(3)[index])(torch.tensor([2, 0]))
print(found.tolist(), torch._dynamo.config.disable, torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)))
"""
COMPILED = "[2, 0] False tensor([2.])"


@pytest.mark.slow
def test_generating_imports_and_keeps_little(tinymix_4bit: Path) -> None:
    said, anonymous, modules, searched, found, compiled = run(GENERATE, str(tinymix_4bit)).splitlines()
    assert UNUSED & set(modules.split()) == set()
    assert int(anonymous) < MOST or torch.version.cuda, "a CUDA build takes more when it is imported: 263 MiB (2.10)"
    assert 0 < int(searched) < 60, "of 560 folders of transformers"
    assert found == "False _StandIn"
    assert compiled == COMPILED
    assert json.loads(said)["text"] == text_of(tinymix_4bit)


def text_of(directory: Path) -> str:
    model, tokenizer = moetier.load(directory, daemon=None)
    with model.tiers:
        ids = tokenizer("Il vecchio", return_tensors="pt").input_ids
        text: str = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    return text


# transformers also guesses names of tokenizers that it has not found
NAMES = """
import json, transformers
for part in (transformers, transformers.models):
    print(*sorted(name for name in dir(part) if not name.startswith("_")))
    print(*sorted(part._modules), *sorted(part._object_missing_backend))
    print(json.dumps(part._class_to_module, sort_keys=True))
for name in ("LlamaTokenizerFast", "CodeLlamaTokenizer", "LayoutXLMTokenizer", "Phi3Tokenizer", "no/name", 300 * "n"):
    print(getattr(transformers, name, None))
print("END OF NAMES")
"""
MADE = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
from moetier.runtime.libraries.lean import lean_imports
with lean_imports():
    exec({NAMES!r})
    import torch
    from architectures import model_class, tiny_config
    made = {{}}
    for model_type in sys.argv[1:]:
        of = model_class(model_type)
        with torch.device("meta"):
            model = of._from_config(tiny_config(of.config_class))
        tensors = {{**dict(model.named_parameters()), **dict(model.named_buffers())}}
        made[model_type] = {{name: f"{{[*t.shape]}} {{t.dtype}} {{t.device}}" for name, t in tensors.items()}}
print(json.dumps(made))
"""


class Lean(NamedTuple):
    """What a process finds that has imported little."""

    names: list[str]  # lines
    made: dict[str, dict[str, str]]  # tensors of models by type and name


@pytest.fixture(scope="module")
def lean(request: pytest.FixtureRequest) -> Lean:
    """With models of the types that are to be tested."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    types = [test.callspec.params["model_type"] for test in tests if test.originalname == "test_models_are_made_alike"]
    names, _, rest = run(MADE, *sorted(types)).partition("END OF NAMES\n")
    return Lean(names.splitlines(), json.loads(rest))


@pytest.mark.slow
def test_with_it_off_a_command_works_and_transformers_has_the_same_names(tinymix_4bit: Path, lean: Lean) -> None:
    """The command builds and loads the model as transformers does, and says the same. The names are in the same
    modules, and need the same libraries."""
    names, _, rest = run(NAMES + GENERATE, str(tinymix_4bit), MOETIER_LEAN="0").partition("END OF NAMES\n")
    said, _, modules, _, found, compiled = rest.splitlines()
    assert "sympy" in modules.split()
    assert found == "True module"
    assert compiled == COMPILED
    assert json.loads(said)["text"] == text_of(tinymix_4bit)
    assert names.splitlines() == lean.names


@pytest.mark.parametrize("model_type", TYPES)
def test_models_are_made_alike(model_type: str, lean: Lean) -> None:
    of = model_class(model_type)
    with torch.device("meta"):
        model = of._from_config(tiny_config(of.config_class))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert lean.made[model_type] == {name: f"{[*t.shape]} {t.dtype} {t.device}" for name, t in tensors.items()}


def test_with_it_off_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETIER_LEAN", "0")
    finders = [*sys.meta_path]
    with lean_imports(), made_on_meta() as mode:
        assert gc.isenabled()
        assert sys.meta_path == finders
        assert mode is None


class Finder:
    """Finds modules that were imported before."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name in self._modules else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        found = ModuleType(spec.name)
        vars(found).update({name: value for name, value in vars(self._modules[spec.name]).items() if name[:2] != "__"})
        return found

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.mark.parametrize("use", ["compiler", "vmap"])
def test_stand_ins_are_there_until_the_compiler_is_used(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that only looks at all modules does not need it."""
    compiler, indexing = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
    real = {name: importlib.import_module(name) for name in (compiler, indexing)}
    monkeypatch.setattr(sys, "meta_path", [Finder(real), *sys.meta_path])
    monkeypatch.setattr(torch, "_dynamo", real[compiler])  # put back afterwards: an import sets it
    for name in real:
        monkeypatch.delitem(sys.modules, name)
    put_stand_ins()
    stand_ins = {name: sys.modules[name] for name in real}
    assert stand_ins[compiler].disable(print) is print
    assert not hasattr(stand_ins[compiler], "__wrapped__")
    assert {name: sys.modules[name] for name in real} == stand_ins
    if use == "compiler":
        assert stand_ins[compiler].config is vars(real[compiler])["config"]
    else:
        assert isinstance(stand_ins[indexing].TransformGetItemToIndex(), real[indexing].TransformGetItemToIndex)
    assert sys.modules[compiler] is not stand_ins[compiler]
    assert not remove_stand_ins(), "they are gone"
