"""Long prompts stay within a control group: of one process, and of a daemon with two clients.

test_a_chunk_shrinks_in_a_control_group, of tests/runtime/model/test_prefill_memory.py, is the quick one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cgroups import memory_limit
from comparison import convert_tiny
from daemons import running_daemon

from moetier.runtime.stores.registry import read_manifest
from moetier.tools.bench.sandbox import MemoryGroup

pytestmark = pytest.mark.slow
QWEN3 = Path(__file__).parents[2] / "build/synthetic/qwen3-8L-4bit"  # made by `moetier synthetic`
MIB = 1 << 20
TOKENS = 6000
LIBRARIES = 300 * MIB if torch.version.cuda is None else 500 * MIB  # what a process takes beside the model
# computes a prompt through the engine, and prints the peak of its memory
CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import moetier
from moetier import Engine, Request
from moetier.runtime.machine.memory import peak_bytes
folder, tokens, daemon, chunk = json.loads(sys.argv[1])
model, _ = moetier.load(folder, daemon=daemon, context=tokens + 64, prefill_chunk=chunk)
with model.tiers, Engine.of(model) as engine:
    ids = tuple(5 + number % 90 for number in range(tokens))
    assert len([*engine.stream(Request(ids, 4, {"do_sample": False, "min_new_tokens": 4}))]) == 4
print(peak_bytes())
"""


def computed(
    group: MemoryGroup, directory: Path, tokens: int, daemon: Path | None = None, *, chunk: int | None = None
) -> int:
    """Compute a prompt in a new process of the control group, and return the peak of that process's memory in bytes.

    The kernel kills it if it takes too much memory.
    """
    given = [str(directory), tokens, None if daemon is None else str(daemon), chunk]
    ended: subprocess.CompletedProcess[str] = group.run([sys.executable, "-c", CHILD, json.dumps(given)], text="")
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr}"
    return int(ended.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 64, "num_hidden_layers": 2}
    sizes |= {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    _, directory = convert_tiny(
        "qwen3_moe", torch.bfloat16, tmp_path_factory.mktemp("peaks"), bits=4, fast=True, **sizes
    )
    return directory


def test_a_long_prompt_stays_within_its_control_group(model: Path) -> None:
    """There is memory for a part of the experts."""
    room = 100 * MIB
    assert read_manifest(model).stored_bytes > room
    with memory_limit(LIBRARIES + room) as group:
        computed(group, model, TOKENS // 4)


def test_a_prompt_takes_no_more_memory_than_in_chunks_of_1024(model: Path) -> None:
    """The slots of experts are what the prompt leaves."""
    with memory_limit(LIBRARIES + 100 * MIB) as group:
        peak, in_chunks = computed(group, model, TOKENS), computed(group, model, TOKENS, chunk=1024)
    print(peak, in_chunks, peak / in_chunks)
    assert peak <= 1.03 * in_chunks


def test_a_daemon_and_two_clients_with_long_prompts_stay_within_a_control_group(model: Path, tmp_path: Path) -> None:
    with memory_limit(1000 * MIB) as group:
        enter = ["sh", "-c", f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"', "sh"]
        with (
            running_daemon(model, ram=60 * MIB, folder=tmp_path / "daemon", prefix=enter) as daemon,
            ThreadPoolExecutor(2) as threads,
        ):
            for client in [threads.submit(computed, group, model, TOKENS, daemon.folder) for _ in range(2)]:
                client.result()
            assert daemon.stats().host.evictions > 0


@pytest.mark.timeout(1800)
def test_a_prompt_of_32000_stays_within_1536_mib() -> None:
    if not QWEN3.exists():
        pytest.skip("there is no synthetic model")
    with memory_limit(1536 * MIB) as group:
        computed(group, QWEN3, 32_000)
