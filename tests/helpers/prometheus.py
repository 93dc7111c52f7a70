"""Prometheus as a real process, which scrapes what a test runs."""

from __future__ import annotations

import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import yaml
from readers import PATIENCE


def scrape(url: str, key: str | None = None, accept: str = "") -> str:
    """Return the response of a server of metrics."""
    headers = {"Accept": accept} | ({"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
        return bytes(answer.read()).decode()


class Prometheus:
    """``targets`` are URLs of metrics, with a key where one is needed."""

    def __init__(self, binary: str, folder: Path, targets: Iterable[tuple[str, str | None]]) -> None:
        jobs = []
        for number, (url, key) in enumerate(targets):
            place = urllib.parse.urlsplit(url)
            job: dict[str, Any] = {
                "job_name": f"moetier-{number}",
                "metrics_path": place.path,
                "static_configs": [{"targets": [place.netloc]}],
                "relabel_configs": [{"target_label": "job", "replacement": "moetier"}],
            }
            jobs.append(job | ({"authorization": {"credentials": key}} if key else {}))
        config = {"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = folder / "prometheus.log"
        self._client = httpx2.Client(timeout=PATIENCE)
        command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--web.listen-address=127.0.0.1:0"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            listening = partial(re.search, r"Listening on.*address=(127\.0\.0\.1:\d+)")
            self.url = f"http://{self._wait(lambda: listening(self._log.read_text())).group(1)}"
            self._client.base_url = httpx2.URL(self.url)
            self._wait(lambda: self._client.get("/-/ready").status_code == 200)  # it listens before it answers
        except BaseException:
            self.end()
            raise

    def _wait(self, found: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (result := found()):
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)
        return result

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Now. Fails with what Prometheus finds wrong with the expression."""
        answer = self._client.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, (expression, answer.text)
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def end(self) -> None:
        self._client.close()
        self.process.kill()
        self.process.wait(PATIENCE)


@contextmanager
def running_prometheus(binary: str, folder: Path, targets: Iterable[tuple[str, str | None]]) -> Iterator[Prometheus]:
    server = Prometheus(binary, folder, targets)
    try:
        yield server
    finally:
        server.end()
