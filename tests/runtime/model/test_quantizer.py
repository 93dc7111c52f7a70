"""How a model directory becomes a transformers model, and what it says when it can't."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from shutil import copytree
from typing import Any

import pytest
import torch
from architectures import tiny_model
from comparison import convert_tiny, smallest_ram
from prepared import Prepared
from readers import PATIENCE
from threads import Task, wait_until
from tier_states import held_lock
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

import moetier
from moetier.runtime.model import budgets
from moetier.runtime.model.prefill_memory import MIN_TOKENS, Prefill
from moetier.runtime.moe.experts import EXPERT_PARAMETERS
from moetier.testing import in_fork
from moetier.tiers.errors import (
    BudgetError,
    ClosedError,
    ConfigError,
    IncompleteStoreError,
    MoetierError,
    StoreFormatError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.folder import GROUP, METADATA
from moetier.tiers.store.reader import ShardStore
from moetier.tools.convert.api import convert

IDS = torch.tensor([[5, 17, 200, 31, 99, 4, 4, 120]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An ordinary mixtral in bf16 and its model directory. Tests must change neither."""
    return convert_tiny("mixtral", torch.bfloat16, tmp_path_factory.mktemp("mixtral"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def copy_of(directory: Path, target: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A copy with another config.json."""
    copytree(directory, target)
    if change:
        config = json.loads((target / "config.json").read_text())
        change(config)
        (target / "config.json").write_text(json.dumps(config))
    return target


# -- it works ----------------------------------------------------------------------------------------------------------


def test_plain_from_pretrained(tiny: tuple[Any, Path]) -> None:
    ordinary, directory = tiny
    moetier.register()
    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    with model.tiers:
        assert torch.equal(logits(model), logits(ordinary))
        assert not any(found.values()), found  # no missing, unexpected or mismatched key
        assert model.config._experts_implementation == "moetier"


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """``moetier.register``, whose options are gone after the test."""
    yield moetier.register
    moetier.register()


def test_options_of_register_hold_for_plain_from_pretrained(
    tiny: tuple[Any, Path], registered: Callable[..., None]
) -> None:
    """They go before what config.json says, those of the last call count, and ``load`` has its own."""
    _, directory = tiny
    registered(ram=smallest_ram(directory), exact=True, daemon=None, threads=1)
    config = AutoConfig.from_pretrained(directory)
    config.quantization_config["ram"] = "100%"
    model = AutoModelForCausalLM.from_pretrained(directory, config=config)
    with model.tiers:
        assert model.tiers.snapshot()["host"]["slots"] == 3
        assert model.tiers.where == "this process"
    loaded, _ = moetier.load(directory)
    with loaded.tiers:
        assert loaded.tiers.snapshot()["host"]["slots"] == 24
    registered()
    again = AutoModelForCausalLM.from_pretrained(directory)
    with again.tiers:
        assert again.tiers.snapshot()["host"]["slots"] == 24


def test_a_pipeline_has_the_budget(tinymix_4bit: Path, registered: Callable[..., None]) -> None:
    registered(ram=smallest_ram(tinymix_4bit), daemon=None)
    generator = pipeline("text-generation", model=str(tinymix_4bit), device="cpu")
    with generator.model.tiers:
        (answer,) = generator("Once upon a time", max_new_tokens=4, do_sample=False)
        assert answer["generated_text"].startswith("Once upon a time")
        host = generator.model.tiers.snapshot()["host"]
        assert host["slots"] * 2 < host["misses"], "as few slots as the budget pays for"


@pytest.mark.parametrize(
    ("options", "error"),
    [({"ram": "much"}, ConfigError), ({"exact": "yes"}, ConfigError), ({"rma": "6GiB"}, TypeError)],
)
def test_wrong_options_of_register_change_nothing(
    tiny: tuple[Any, Path], options: dict[str, Any], error: type[Exception], registered: Callable[..., None]
) -> None:
    registered(ram=smallest_ram(tiny[1]))
    with pytest.raises(error):
        registered(**options)
    model = AutoModelForCausalLM.from_pretrained(tiny[1])
    with model.tiers:
        assert model.tiers.snapshot()["host"]["slots"] == 3


def test_registering_again_changes_nothing() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: moetier.register(), range(32))) == [None] * 32


def test_the_function_cannot_be_chosen_away(tiny: tuple[Any, Path]) -> None:
    ordinary, directory = tiny
    moetier.register()
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")
    with model.tiers:
        assert torch.equal(logits(model), logits(ordinary))


def test_a_device_map_for_one_device(tiny: tuple[Any, Path]) -> None:
    ordinary, directory = tiny
    moetier.register()
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="auto")
    with model.tiers:
        assert torch.equal(logits(model.to("cpu")), logits(ordinary))


def test_budgets_may_stand_in_the_config(tiny: tuple[Any, Path]) -> None:
    _, directory = tiny
    moetier.register()
    config = AutoConfig.from_pretrained(directory)
    config.quantization_config["ram"] = smallest_ram(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, config=config)
    with model.tiers:
        assert model.tiers.snapshot()["host"]["slots"] == 3


def test_a_misspelt_budget_is_refused(tiny: tuple[Any, Path]) -> None:
    """And what the converter noted passes: every other test loads it."""
    _, directory = tiny
    moetier.register()
    config = AutoConfig.from_pretrained(directory)
    assert config.quantization_config["bits"] == 16
    config.quantization_config["rma"] = smallest_ram(directory)
    with pytest.raises(ConfigError, match=r"'rma'(?s:.*)ram, device_memory, context, kv_cache, kv_bits, exact"):
        AutoModelForCausalLM.from_pretrained(directory, config=config)


def test_budgets_leave_room_for_a_prompt(tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """If even the fewest tokens have no room, there is no budget for experts."""
    monkeypatch.setattr(budgets, "prefill_of", lambda *_: Prefill(MIN_TOKENS, fixed=1 << 50))
    with pytest.raises(BudgetError, match="The rest is less than"):
        moetier.load(tiny[1])


def test_more_memory_than_there_is_does_no_harm_where_all_experts_fit(tiny: tuple[Any, Path]) -> None:
    model, _ = moetier.load(tiny[1], ram="100TiB")
    with model.tiers:
        assert model.tiers.snapshot()["host"]["slots"] == 24


def test_another_type_of_numbers(tiny: tuple[Any, Path]) -> None:
    """Loaded in fp32, and turned into fp32 later: as the ordinary model does both."""
    _, directory = tiny
    expected = logits(tiny_model("mixtral", torch.bfloat16).float())
    moetier.register()
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    turned, _ = moetier.load(directory)
    with loaded.tiers, turned.tiers:
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(logits(turned.to(torch.float32)), expected)


def test_two_models_at_once(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    ordinary, directory = tiny
    other_ordinary, other_directory = convert_tiny("qwen3_moe", torch.bfloat16, tmp_path)
    first, _ = moetier.load(directory)
    second, _ = moetier.load(other_directory)
    again, _ = moetier.load(directory, ram=smallest_ram(directory))
    with first.tiers, second.tiers, again.tiers:
        for model, expected in ((first, ordinary), (second, other_ordinary), (again, ordinary), (first, ordinary)):
            assert torch.equal(logits(model), logits(expected))


def test_loading_reads_the_trunk_only(tmp_path: Path) -> None:
    """Counted by the kernel: what this process reads (mapped files aside) while it loads is less than one expert."""
    ordinary, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path, intermediate_size=4096)
    moetier.load(directory)[0].tiers.close()  # imports what loading imports
    read = _bytes_read()
    model, _ = moetier.load(directory)
    read = _bytes_read() - read
    with model.tiers:
        assert read < model.tiers.manifest.layout(0).record_bytes
        assert model.tiers.snapshot()["host"]["bytes_in"] == 0
        names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        assert not names & set(EXPERT_PARAMETERS)
        assert torch.equal(logits(model), logits(ordinary))


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_no_gradient_vanishes(tiny: tuple[Any, Path]) -> None:
    """Outside of no_grad a model runs as any other does; who wants a gradient is told that there is none."""
    ordinary, folder = tiny
    model, _ = moetier.load(folder)
    with model.tiers:
        found = model(input_ids=IDS).logits
        assert torch.equal(found, ordinary(input_ids=IDS).logits)
        with pytest.raises(ConfigError, match="gradient"):
            found.sum().backward()


# -- it ends -----------------------------------------------------------------------------------------------------------


def _loaders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moetier-loader")]


def test_the_end_of_the_model_is_the_end_of_its_tiers(tiny: tuple[Any, Path]) -> None:
    model, _ = moetier.load(tiny[1])
    logits(model)
    tiers = weakref.ref(model.tiers)
    assert _loaders()
    del model
    gc.collect()
    wait_until(lambda: tiers() is None and not _loaders())


def test_a_lost_model_is_closed_also_by_a_thread_that_holds_its_lock(tiny: tuple[Any, Path]) -> None:
    model, _ = moetier.load(tiny[1])
    host, found = model.tiers.host, list[Any]()
    list(host.acquire([ExpertKey(0, 0)]))

    def collect(event: object) -> None:
        gc.collect()
        found.append(lost())

    session = host.session(collect)  # which is told of leases by who holds the lock
    lost = _lose(model)
    del model, host
    Task(lambda: session.acquire(1, [ExpertKey(0, 0)])).result()
    assert found[0] is None
    wait_until(lambda: not _loaders())


def test_a_lost_model_is_closed_also_when_found_by_its_loader(
    tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, found = threading.Event(), list[Any]()
    read_into = ShardStore.read_into

    def collect_and_read(store: ShardStore, key: ExpertKey, buffer: memoryview, pause: Any = None) -> None:
        assert go.wait(PATIENCE)
        gc.collect()
        read_into(store, key, buffer)
        found.append(lost())

    monkeypatch.setattr(ShardStore, "read_into", collect_and_read)
    model, _ = moetier.load(tiny[1])
    model.tiers.host.prefetch(0, [ExpertKey(0, 0)])
    lost = _lose(model)
    del model
    go.set()
    wait_until(lambda: not _loaders())
    assert found == [None]


def _hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_closing_takes_all_hooks_away(tiny: tuple[Any, Path]) -> None:
    model, _ = moetier.load(tiny[1], speculate="always", look_ahead=2)
    logits(model)
    assert _hooks(model) > 1
    model.tiers.close()
    assert _hooks(model) == 0
    assert model.tiers.speculation.stats().guesses != (0, 0, 0), "what it did is known all the same"
    with pytest.raises(ClosedError, match="closed"):
        logits(model)
    assert _hooks(model) == 0


@pytest.mark.parametrize("closes", [True, False])
def test_the_trunk_goes_with_the_model_whoever_holds_its_tiers(tiny: tuple[Any, Path], closes: bool) -> None:
    """At once: no collector has to come by."""
    model, _ = moetier.load(tiny[1], speculate="always", look_ahead=2)
    logits(model)
    tiers, layer, lost = model.tiers, weakref.ref(model.model.layers[1]), _lose(model, cycle=False)
    gc.disable()
    try:
        if closes:
            tiers.close()
        del model
        assert lost() is None
        assert layer() is None
    finally:
        gc.enable()
    wait_until(lambda: not _loaders())
    assert tiers.speculation.stats().mode == "always"


def test_a_module_may_refer_to_its_model(tiny: tuple[Any, Path]) -> None:
    model, _ = moetier.load(tiny[1], speculate="always")
    logits(model)
    model.model.layers[0].__dict__["whole"] = model
    lost = _lose(model)
    del model
    gc.collect()
    assert lost() is None
    wait_until(lambda: not _loaders())


def _lose(model: Any, *, cycle: bool = True) -> weakref.ref[Any]:
    """Puts it in a cycle, which only the collector finds."""
    gc.collect()
    if cycle:
        model.__dict__["cycle"] = [model]
    return weakref.ref(model)


def test_a_forked_child_is_told_and_closes_its_own(tiny: tuple[Any, Path]) -> None:
    model, _ = moetier.load(tiny[1])
    key, tiers = ExpertKey(0, 0), model.tiers
    with tiers:
        expected = logits(model)
        list(tiers.host.acquire([key]))
        assert "another process's tier" in in_fork(lambda: logits(model))
        with held_lock(tiers.host, key):
            assert in_fork(tiers.close) == "returned None"
        assert torch.equal(logits(model), expected)


def test_what_is_closed_says_so(tiny: tuple[Any, Path]) -> None:
    model, _ = moetier.load(tiny[1])
    model.tiers.close()
    model.tiers.close()
    with pytest.raises(ClosedError, match="closed"):
        logits(model)


def test_a_process_may_end_without_closing(scripts: Prepared, tiny: tuple[Any, Path]) -> None:
    code = "import moetier, sys; m, _ = moetier.load(sys.argv[1]); m.generate(max_new_tokens=2, do_sample=False)"
    result = scripts.run(code, tiny[1])
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


def test_a_process_ends_only_when_its_lost_models_are_closed(scripts: Prepared, tiny: tuple[Any, Path]) -> None:
    """A loader in the midst of something would meet an interpreter that is gone, and abort."""
    code = """
import sys, time
import moetier
from moetier.tiers.store.reader import ShardStore

close = ShardStore.close

def slow(store):
    time.sleep(0.5)
    close(store)
    print("closed", flush=True)

ShardStore.close = slow
model, _ = moetier.load(sys.argv[1], daemon=None)
del model
"""
    result = scripts.run(code, tiny[1])
    assert (result.returncode, result.stdout) == (0, "closed\n"), result.stderr


def test_the_model_cannot_be_saved_without_its_experts(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    with moetier.load(tiny[1]) as (model, _), pytest.raises(ConfigError, match="can't be saved") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert caught.value.fix == f"Copy {tiny[1]}; or, to an object store: moetier push {tiny[1]} ADDRESS"
    with pytest.raises(ClosedError):
        model(torch.tensor([[1]]))


# -- it can't ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a process imports all of transformers
def test_without_moetier_transformers_refuses(tiny: tuple[Any, Path]) -> None:
    """And does not fill experts at random."""
    # transformers would import hqq, which this project's tests need, and with it torch's compiler
    code = "import sys; sys.modules['hqq'] = None; import transformers\n"
    code += "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(tiny[1])], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert '`experts_implementation="moetier"` is not supported' in result.stderr


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_set(auto_map={"AutoModel": "x.Y"}), UnsafeCheckpointError, "auto_map"),
        (_set(architectures=["NoSuchForCausalLM"]), UnsupportedModelError, "NoSuchForCausalLM"),
        (_set(architectures=["AutoModel"]), UnsupportedModelError, "'AutoModel'"),
        (_set(architectures=None), UnsupportedModelError, "None"),
        (_set(quantization_config=None), StoreFormatError, "does not name moetier"),
        (_set(quantization_config={"quant_method": "gptq"}), StoreFormatError, "does not name moetier"),
        (_set(quantization_config={"quant_method": "moetier", "format": 2}), StoreFormatError, "version 2.*version 1"),
        (_set(num_local_experts=4), StoreFormatError, "8 experts .* and 4 "),
        (_set(intermediate_size=32), StoreFormatError, r"\(192, 64\).*\(64, 64\)"),
        (_set(num_hidden_layers=4), StoreFormatError, r"the store lacks the experts module model\.layers\.3\."),
        (_set(num_hidden_layers=2), StoreFormatError, r"the model lacks the experts module model\.layers\.2\."),
        (
            _set(architectures=["LlamaForCausalLM"], model_type="llama"),
            UnsupportedModelError,
            "LlamaForCausalLM has no module with transformers' experts interface",
        ),
    ],
)
def test_a_config_that_does_not_fit(
    tiny: tuple[Any, Path], tmp_path: Path, change: Any, error: type[MoetierError], words: str
) -> None:
    directory = copy_of(tiny[1], tmp_path / "copy", change)
    with pytest.raises(error, match=words) as caught:
        moetier.load(directory)
    assert "\n" not in caught.value.cause
    assert caught.value.fix


def test_no_code_of_a_checkpoint_is_run(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    """Not by load, and not by plain from_pretrained either."""
    witness = tmp_path / "witness"
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    directory = copy_of(tiny[1], tmp_path / "copy", _set(auto_map=names))
    (directory / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    with pytest.raises(UnsafeCheckpointError):
        moetier.load(directory)
    moetier.register()
    with pytest.raises(UnsafeCheckpointError):
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    assert not witness.exists()


def test_a_class_with_other_paths(tiny: tuple[Any, Path]) -> None:
    moetier.register()
    with pytest.raises(StoreFormatError, match=r"(?s)does not fit MixtralModel.*architectures"):
        AutoModel.from_pretrained(tiny[1])


@pytest.mark.parametrize("missing", ["config.json", f"{GROUP}/{METADATA}", GROUP, ""])
def test_a_folder_that_is_no_model_directory(tiny: tuple[Any, Path], tmp_path: Path, missing: str) -> None:
    directory = copy_of(tiny[1], tmp_path / "copy")
    (directory / missing).rename(tmp_path / "gone")
    expected = IncompleteStoreError if missing.endswith(METADATA) else StoreFormatError
    with pytest.raises(expected, match=str(directory)):
        moetier.load(directory)


def test_a_config_that_is_no_json(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    directory = copy_of(tiny[1], tmp_path / "copy")
    (directory / "config.json").write_text("{")
    with pytest.raises(StoreFormatError, match="is not JSON"):
        moetier.load(directory)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ram": 1000}, BudgetError, "too small"),
        ({"ram": "much"}, ConfigError, "not an amount"),
        ({"device": "tpu"}, ConfigError, "not a device"),
        ({"device": "cpu", "device_memory": "1GiB"}, ConfigError, "no device memory"),
        ({"exact": "yes"}, ConfigError, "`exact` is 'yes'"),
        ({"dtype": "int8"}, ConfigError, "`dtype` is 'int8'"),
        ({"dtype": torch.int8}, ConfigError, "`dtype` is torch.int8"),
        ({"dtype": 16}, ConfigError, "`dtype` is 16"),
        ({"attn_implementation": "quick"}, ConfigError, "`attn_implementation` is 'quick'"),
    ],
)
def test_options_that_cannot_work(
    tiny: tuple[Any, Path], options: dict[str, Any], error: type[MoetierError], words: str
) -> None:
    with pytest.raises(error, match=words):
        moetier.load(tiny[1], **options)


def test_an_error_names_the_parameter_and_not_the_option(tiny: tuple[Any, Path]) -> None:
    with pytest.raises(BudgetError) as caught:
        moetier.load(tiny[1], ram="100B")
    assert caught.value.cause == "`ram` of 100 B is too small."
    assert "Give `ram` from " in caught.value.fix


def test_numbers_and_attention_may_be_chosen(tiny: tuple[Any, Path]) -> None:
    ordinary, directory = tiny
    expected = logits(tiny_model("mixtral", torch.bfloat16).float())
    for dtype in (torch.float32, "float32"):
        model, _ = moetier.load(directory, dtype=dtype, attn_implementation="sdpa")
        with model.tiers:
            assert torch.equal(logits(model), expected)
    eager, _ = moetier.load(directory, attn_implementation="eager")
    with eager.tiers:
        assert eager.config._attn_implementation == "eager"
        assert eager.dtype == ordinary.dtype
        assert (logits(eager) - logits(ordinary)).abs().max() < 0.1


def test_the_version() -> None:
    assert moetier.__version__ == version("moetier")
    assert "__version__" in dir(moetier)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(tiny: tuple[Any, Path]) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        moetier.load(tiny[1], device="cuda")


@pytest.mark.parametrize("moment", ["load.chosen_device", "sources.open_store"])
def test_a_directory_that_is_replaced_while_it_is_loaded_is_the_new_one_or_an_error(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``convert --overwrite`` replaces it by another one with records of another size."""
    _, old = convert_tiny("mixtral", torch.bfloat16, tmp_path, bits=8)
    new = tmp_path / "new"
    convert(tmp_path / "source", new, bits=4)
    model, _ = moetier.load(new, daemon=None)
    with model.tiers:
        expected = logits(model)
    place = f"moetier.runtime.model.{moment}"
    ordinary = resolve_name(place)

    def replace(*arguments: Any, **named: Any) -> Any:
        if new.exists():
            old.rename(tmp_path / "was")
            new.rename(old)
        return ordinary(*arguments, **named)

    monkeypatch.setattr(place, replace)
    if moment == "sources.open_store":  # the trunk's files are open, and so not the new ones
        with pytest.raises(StoreFormatError, match="was replaced while it was loaded"):
            moetier.load(old, daemon=None)
    else:
        model, _ = moetier.load(old, daemon=None)
        with model.tiers:
            assert model.tiers.manifest.layout(0).projections[0].bits == 4
            assert torch.equal(logits(model), expected)
