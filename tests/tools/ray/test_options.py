"""Options of the application, as the command line, Python and Ray Serve give them; the application that they make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moetier.ray import app
from moetier.tiers.errors import ConfigError
from moetier.tools.ray.options import daemon_words, parsed, replica_resources

BUILT = """
import sys
from pathlib import Path
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from moetier.ray import app
built = build(app, {"model": sys.argv[1], "ram": "1GiB", "threads": "2", "parallel": 3, "max_replicas": "4"})
other = app(model=sys.argv[1], ram="1GiB", threads=2, parallel=3, max_replicas=4)
for one in built, other:
    deployment = one._bound_deployment
    (options,) = deployment.init_args
    print(deployment.name, deployment.num_replicas, deployment.max_ongoing_requests, options["model"])
    config = deployment._deployment_config.autoscaling_config
    print(config.min_replicas, config.max_replicas, config.target_ongoing_requests)
    print(deployment.ray_actor_options["num_cpus"], options["ram"], options["threads"], options["parallel"])
"""


def test_values_are_texts_or_numbers() -> None:
    texts = parsed({"model": "m", "threads": "2", "exact": "true", "learn": "false", "ram": "1GiB"})
    assert vars(texts) == vars(parsed({"model": "m", "threads": 2, "exact": True, "learn": False, "ram": "1GiB"}))
    assert (texts.threads, texts.exact, texts.learn, texts.max_replicas) == (2, True, False, None)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({}, "needs DIR"),
        ({"model": "m", "ramm": "1GiB"}, "no option --ramm"),
        ({"model": "m", "ram": "much"}, "not an amount of memory"),
        ({"model": "m", "min_replicas": 0}, "out of range"),
        ({"model": "m", "policy": "none"}, "--policy can't be none"),
        ({"model": "m", "daemon": "work"}, "no option --daemon"),
        ({"model": "m", "learn": "nonsense"}, "learn can't be 'nonsense'"),
        ({"model": "m", "exact": 2}, "exact can't be 2"),
    ],
)
def test_what_is_wrong_is_an_error(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        app(options)


def test_each_process_gets_its_own_options(tmp_path: Path) -> None:
    found = parsed({"model": "m", "ram": "1GiB", "learn": True, "parallel": 2, "context": 100, "speculate": "off"})
    words = ["m", "--ram", "1GiB", "--policy", "lrfu", "--learn", "--loaders", str(found.loaders)]
    assert daemon_words(found) == words
    resources = replica_resources(found, tmp_path)
    assert resources["daemon"] == str(tmp_path)
    assert (resources["ram"], resources["context"], resources["speculate"]) == (None, 100, "off")
    assert "learn" not in resources


def test_a_path_is_of_the_folder_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parsed({"model": "here"}).model == str(tmp_path / "here")
    assert parsed({"model": "s3://bucket/here"}).model == "s3://bucket/here"


def test_ray_is_imported_only_for_an_application() -> None:
    code = (
        "import moetier.ray, sys; from moetier.tools.main import build_parser, commands_of; commands_of(build_parser())"
    )
    command = [sys.executable, "-c", f"{code}; sys.exit('ray' in sys.modules)"]
    assert subprocess.run(command, check=False).returncode == 0


def test_python_and_ray_serve_build_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='pip install ".[ray]"')
    done = subprocess.run([sys.executable, "-c", BUILT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"moetier 1 6 {tmp_path}", "1 4 3.0", "2 1GiB 2 3"]
    assert lines[:3] == lines[3:]


def test_the_command_does_not_wait_without_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='pip install ".[ray]"')
    pytest.importorskip("starlette", reason='pip install ".[serve]"')
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "moetier", "ray", tmp_path, "--threads", "1"],
        env=environment | {"RAY_TMPDIR": str(tmp_path)},  # where no cluster is
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("moetier: There is no Ray cluster on this machine.\n  Start one"), done.stderr
