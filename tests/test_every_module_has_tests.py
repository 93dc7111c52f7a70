"""Tests mirror the code: those of tiers/store/shard.py are in tests/tiers/store/test_shard.py.

A module of up to MAX_STATEMENTS may be tested by the tests of its users; one whose objects change, only up to
MAX_WITH_STATE. A larger one has a file of its own, or is in TESTED_BY with the file that tests it and the reason.
"""

from __future__ import annotations

import ast

from places import ROOT, TESTS

MAX_STATEMENTS = 60
MAX_WITH_STATE = 50

CODE = "it writes compiled code, which is compared with torch as a whole"
COMMAND = "the work of a command, which is tested with its command line"

# module -> the file under tests/ whose tests run it, and why it has no file of its own
TESTED_BY: dict[str, tuple[str, str]] = {
    "runtime/checkpoint/decoded_trunk.py": (
        "runtime/model/test_trunk_files.py",
        "its weights are compared with those that files of a trunk give",
    ),
    "runtime/devices/cuda.py": ("tiers/device/test_tier.py", "it needs a GPU: the tests marked cuda"),
    "runtime/kernels/codings/row_codings.py": ("runtime/kernels/products/test_row_major.py", CODE),
    "runtime/kernels/codings/row_emitter.py": ("runtime/kernels/products/test_row_major.py", CODE),
    "runtime/kernels/experts/expert_products.py": ("runtime/kernels/experts/test_expert_kernels.py", CODE),
    "runtime/kernels/layer/attention_code.py": ("runtime/kernels/layer/test_attend.py", CODE),
    "tools/chat/chat_input.py": (
        "tools/chat/test_chat_screen.py",
        "what is typed is tested on a screen, where it is seen",
    ),
    "runtime/engine/constraint.py": (
        "runtime/engine/test_grammar.py",
        "what it leaves of logits is what a grammar allows",
    ),
    "runtime/kernels/layer/attention_piece.py": ("runtime/kernels/layer/test_attend.py", CODE),
    "runtime/kernels/layer/attention_tasks.py": ("runtime/kernels/layer/test_attention.py", CODE),
    "runtime/kernels/layer/heads.py": ("runtime/kernels/layer/test_attention.py", CODE),
    "runtime/kernels/layer/routing_code.py": ("runtime/kernels/layer/test_routing.py", CODE),
    "runtime/kernels/products/gemm.py": ("runtime/kernels/products/test_api.py", CODE),
    "runtime/kernels/products/gemm_avx2.py": ("runtime/kernels/products/test_processors.py", CODE),
    "runtime/kernels/products/gemm_tile.py": ("runtime/kernels/products/test_api.py", CODE),
    "runtime/kernels/products/words.py": ("runtime/kernels/layer/test_attend.py", CODE),
    "runtime/kernels/products/rounding.py": ("runtime/kernels/products/test_api.py", CODE),
    "runtime/kernels/quantise/quantise_code.py": ("runtime/kernels/quantise/test_encode.py", CODE),
    "runtime/libraries/transformers_internals.py": ("runtime/libraries/test_internals.py", "all libraries are in one"),
    "runtime/moe/layer_forms.py": (
        "runtime/moe/test_layers.py",
        "a form is right if the layer that it makes computes the same bits",
    ),
    "runtime/moe/snapshot.py": (
        "runtime/moe/test_layers.py",
        "a change that it must detect is made to a layer, which then computes otherwise",
    ),
    "tiers/device/device_pool.py": ("tiers/device/test_tier.py", "only a device tier fills and shrinks it"),
    "tiers/device/views.py": ("tiers/test_source_contract.py", "a source of experts, tested as all of them are"),
    "tiers/objects/cache_writer.py": (
        "tiers/objects/test_cache.py",
        "what it writes is read again, through the store that writes it",
    ),
    "tiers/store/base.py": ("tiers/test_store_contract.py", "an interface: each store is tested by its contract"),
    "tools/bench/child.py": ("tools/commands/test_bench.py", COMMAND),
    "tools/bench/convert.py": ("tools/commands/test_bench.py", COMMAND),
    "tools/bench/kernels.py": ("tools/commands/test_bench.py", COMMAND),
    "tools/bench/model.py": ("tools/commands/test_bench.py", COMMAND),
    "tools/chat/answer.py": ("tools/commands/test_chat.py", COMMAND),
    "tools/chat/dialogue.py": ("tools/commands/test_chat.py", COMMAND),
    "tools/cli/arguments.py": ("tools/cli/test_settings.py", "values of arguments and of settings are parsed alike"),
    "tools/cli/report.py": ("tools/commands/test_stats.py", COMMAND),
    "tools/convert/mirror_writer.py": ("tools/commands/test_mirror.py", COMMAND),
    "tools/doctor/verification.py": ("tools/commands/test_verify.py", COMMAND),
    "tools/launch/clients.py": ("tools/commands/test_launch.py", COMMAND),
    "tools/launch/server.py": ("tools/commands/test_launch.py", COMMAND),
    "tools/plan/forecast.py": ("tools/commands/test_plan.py", COMMAND),
    "tools/plan/speeds.py": ("tools/commands/test_plan.py", COMMAND),
    "tools/serve/answer_grammar.py": (
        "tools/serve/test_constraints.py",
        "a grammar is right if the answers of a model that it constrains are",
    ),
    "tools/serve/protocols/events.py": (
        "tools/serve/protocols/test_messages.py",
        "values that a protocol writes, tested by what is written",
    ),
    "tools/serve/metrics.py": ("tools/serve/test_keys.py", "it counts by API keys, and the tests ask with these"),
    "tools/serve/protocols/responses_body.py": (
        "tools/serve/protocols/test_responses.py",
        "the body of requests, tested with the answers of the same protocol",
    ),
    "tools/synthetic/tensors.py": (
        "tools/synthetic/test_checkpoint.py",
        "its values are right if a checkpoint of them routes like a trained model",
    ),
    "tools/top/watch.py": ("tools/top/test_app.py", "what it has read is tested on a screen, where it is seen"),
}


def statements(source: str) -> int:
    """Count the statements of a module; docstrings are none."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


def has_state(source: str) -> bool:
    """Return whether a method of the module, other than ``__init__``, sets an attribute of its object."""
    methods = [
        method
        for owner in ast.walk(ast.parse(source))
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and method.name != "__init__"
    ]
    stored = [node for method in methods for node in ast.walk(method) if isinstance(node, ast.Attribute)]
    return any(isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self" for node in stored)


def test_every_module_has_tests_of_its_name_or_says_which_test_it() -> None:
    without = {
        path.relative_to(ROOT).as_posix()
        for folder in ("tiers", "runtime", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if not (TESTS / path.relative_to(ROOT).with_name(f"test_{path.name}")).exists()
        if statements(source := path.read_text()) > (MAX_WITH_STATE if has_state(source) else MAX_STATEMENTS)
    }
    assert without - TESTED_BY.keys() == set(), "add a test file of the same name in the same folder below tests/"
    assert TESTED_BY.keys() - without == set(), "these have tests of their name now, or are small or gone"


def test_the_named_tests_are_there() -> None:
    assert {file for file, _ in TESTED_BY.values() if not (TESTS / file).exists()} == set()
