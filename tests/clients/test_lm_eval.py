"""lm_eval scores a task with ``moetier serve`` as it does with transformers."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

from environments import with_packages
from http_servers import KEY, ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PACKAGES = ("lm-eval==0.4.13", "accelerate", "aiohttp", "tenacity", "tiktoken", "requests", "tqdm")
QUESTIONS = 20
TEXTS = [
    "Quel ramo del lago di Como, che volge a mezzogiorno, tra due catene non interrotte di monti",
    "Don Abbondio non era nato con un cuor di leone, e se n'era accorto fin da' primi anni",
    "La mattina seguente, don Rodrigo si destò don Rodrigo, e pensò subito a quel giorno",
    "Il sole non era ancor tutto apparso sull'orizzonte, quando il padre Cristoforo uscì dal suo convento",
    "Addio, monti sorgenti dall'acque, ed elevati al cielo; cime inuguali, note a chi è cresciuto tra voi",
]
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def write_task(folder: Path) -> None:
    """Write a task in which a text is to be continued by its own words: hard for a toy, so that answers are close."""
    random_, lines = random.Random(0), list[str]()
    for _ in range(QUESTIONS):
        words = random_.choice(TEXTS).split()
        place = random_.randrange(3, len(words) - 3)
        choices = [" " + " ".join(words[place : place + 3])]
        while len(choices) < 4:
            other = random_.choice(TEXTS).split()
            at = random_.randrange(len(other) - 3)
            choices.append(" " + " ".join(other[at : at + 3]))
        right = random_.randrange(4)
        choices[0], choices[right] = choices[right], choices[0]
        lines.append(json.dumps({"start": " ".join(words[:place]), "choices": choices, "right": right}))
    (folder / "toy.jsonl").write_text("\n".join(lines))
    (folder / "toy.yaml").write_text(TASK.replace("FILE", str(folder / "toy.jsonl")))


def scores(python: Path, folder: Path, name: str, arguments: Sequence[str]) -> dict[str, float]:
    """Return what lm_eval finds with a model: its accuracy, and that with log probabilities per byte."""
    words = [python.parent / "lm_eval", "--tasks", "toy", "--include_path", folder, "--output_path", folder / name]
    variables = {
        "HOME": str(folder), "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"),
        "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([*words, *arguments], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (file,) = (folder / name).rglob("results*.json")
    found = json.loads(file.read_text())["results"]["toy"]
    return {metric: found[f"{metric},none"] for metric in ("acc", "acc_norm")}


def test_a_task_has_the_same_scores(tinymix: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    python = with_packages(Path(request.config.cache.mkdir("lm-eval")), PACKAGES, sees_ours=True)
    write_task(tmp_path)
    with_transformers = ["--model", "hf", "--model_args", f"pretrained={tinymix},dtype=bfloat16", "--device", "cpu"]
    wanted = scores(python, tmp_path, "hf", with_transformers)
    server = ServerProcess(tinymix, tmp_path, ["--daemon", "none", "--exact", "--name", "tinymix"])
    try:
        where = f"base_url={server.url}/v1/completions,model=tinymix,tokenizer={tinymix},num_concurrent=4"
        found = scores(python, tmp_path, "http", ["--model", "local-completions", "--model_args", where])
    finally:
        server.end()
    print(wanted, found)
    assert found == wanted
