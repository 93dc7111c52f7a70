"""Compare docs/metrics.md and the files in docs/deploy with the metrics of a running daemon and server."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')
pytest.importorskip("prometheus_client", reason='pip install ".[serve]"')

import yaml
from daemons import running_daemon
from http_servers import KEY, ServerProcess
from prometheus import running_prometheus, scrape
from prometheus_client.parser import text_string_to_metric_families as parsed
from readers import PATIENCE
from threads import wait_until

DOCS = Path(__file__).parent.parent / "docs"
DASHBOARD = json.loads((DOCS / "deploy/grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule for group in yaml.safe_load((DOCS / "deploy/alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
OF_PROMETHEUS = {"instance", "job"}  # labels that it adds


def filled_in(query: str) -> str:
    """As Grafana sends it, with all that can be chosen."""
    for variable, value in {"$__rate_interval": "1m", "$instance": ".*", "$model": ".*"}.items():
        query = query.replace(variable, value)
    assert "$" not in query
    return query


QUERIES = [filled_in(target["expr"]) for target in TARGETS]


@dataclass(frozen=True)
class Scraped:
    """What a daemon and a server that uses it say when both have done something."""

    targets: list[tuple[str, str | None]]
    texts: list[str]

    @property
    def samples(self) -> dict[str, list[dict[str, str]]]:
        """The labels of each sample, by its name."""
        found: dict[str, list[dict[str, str]]] = {"up": [{}]}  # Prometheus's own
        for text in self.texts:
            for family in parsed(text):
                for sample in family.samples:
                    found.setdefault(sample.name, []).append(sample.labels)
        return found

    @property
    def types(self) -> dict[str, str]:
        """Of each metric of ours."""
        return dict(re.findall(r"^# TYPE (moetier_\w+) (\w+)$", "\n".join(self.texts), re.MULTILINE))


@pytest.fixture(scope="module")
def scraped(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    place = tmp_path_factory.mktemp("watching")
    with running_daemon(tinymix_4bit, folder=place / "daemon", extra=["--metrics", "0"]) as daemon:
        options = ["--daemon", str(daemon.folder), "--context", "500", "--kv-cache-dir", str(place / "pages")]
        server = ServerProcess(tinymix_4bit, place, options)
        try:
            with server.client() as client:
                client.completions.create(model=tinymix_4bit.name, prompt="La mattina", max_tokens=8)
            targets = [(f"http://{daemon.card.metrics}/metrics", None), (server.url + "/metrics", KEY)]
            yield Scraped(targets, [scrape(*target) for target in targets])
        finally:
            server.end()


def names_and_labels(query: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Each metric with the labels that the query wants of it; with the value, where it wants a certain one."""
    groups = {name: None for names in re.findall(r"\bby \(([^)]*)\)", query) for name in names.split(", ")}
    for name, matchers in re.findall(r"\b((?:moetier|process)_\w+|up)\b(?:\{([^}]*)\})?", query):
        wanted = re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers)
        yield name, groups | {label: value if sign == "=" else None for label, sign, value in wanted}


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_a_query_names_what_there_is(scraped: Scraped, query: str) -> None:
    found = list(names_and_labels(query))
    assert found
    for name, labels in found:
        assert name in scraped.samples, f"no metric {name}"
        for sample in [sample | dict.fromkeys(OF_PROMETHEUS, "moetier") for sample in scraped.samples[name]]:
            if all(value in (None, sample.get(label)) for label, value in labels.items()):
                assert labels.keys() <= sample.keys(), f"{name} lacks a label of {set(labels)}"
                break
        else:
            pytest.fail(f"no {name} with {labels}")


def test_prometheus_finds_something_for_each_query(scraped: Scraped, tmp_path: Path) -> None:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is missing")
    with running_prometheus(binary, tmp_path, scraped.targets) as prometheus:
        for query in QUERIES:
            wait_until(lambda query=query: prometheus.query(query))
        for target in TARGETS:
            of_legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert all(of_legend <= series["metric"].keys() for series in prometheus.query(filled_in(target["expr"])))
        for rule in RULES:
            prometheus.query(rule["expr"])
        wait_until(lambda: [one["value"][1] for one in prometheus.query('up{job="moetier"}')] == ["1", "1"])


@pytest.mark.slow
def test_a_picture_of_it_has_every_panel(scraped: Scraped, tmp_path: Path) -> None:
    """As docs/figures/dashboard.py draws it; legends are of what was scraped."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is missing")
    script = runpy.run_path(str(DOCS / "figures/dashboard.py"))
    with running_prometheus(binary, tmp_path, scraped.targets) as prometheus:

        def drawn() -> set[str]:
            asked = script["Prometheus"](
                prometheus.url, end=time.time(), seconds=30.0, scrape=1.0, variables=script["variables_of"](DASHBOARD)
            )
            return {text.get_text() for text in script["draw"](DASHBOARD, asked).texts}

        for query in QUERIES:
            wait_until(lambda query=query: prometheus.query(query))
        # rates are of the last four seconds, of which there is nothing yet at the first
        wait_until(lambda: not {"No data", "NaN", "no server", "no daemon"} & drawn())
        words = drawn()
    assert {panel["title"] for panel in PANELS} <= words
    assert [text for text in words if re.fullmatch(r"p99 host \S+ 127\.0\.0\.1:\d+", text)]


def test_promtool_finds_no_fault(scraped: Scraped) -> None:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is missing")
    check = partial(subprocess.run, capture_output=True, text=True, timeout=PATIENCE, check=False)
    for text in scraped.texts:
        done = check([binary, "check", "metrics"], input=text)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = check([binary, "check", "rules", str(DOCS / "deploy/alerts.yaml")])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(RULES)} rules found" in done.stdout


def test_the_table_has_every_metric(scraped: Scraped) -> None:
    text = (DOCS / "metrics.md").read_text()
    rows = re.findall(r"^\| `(moetier_\w+)` \| (\w+) \|", text, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    assert dict(rows) == scraped.types


def test_every_alert_is_explained() -> None:
    text = (DOCS / "metrics.md").read_text()
    assert re.findall(r"^\| `(Moetier\w+)` \|", text, re.MULTILINE) == [rule["alert"] for rule in RULES]


def test_the_dashboard_is_whole() -> None:
    """What Grafana would refuse, or show wrongly."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["title"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, width, height = (panel["gridPos"][name] for name in "xywh")
        cells = {(column, line) for column in range(x, x + width) for line in range(y, y + height)}
        assert x + width <= 24
        assert not taken & cells, f"{panel['title']} lies over another"
        taken |= cells
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["description"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in ("percentunit", "binBps", "bytes", "s", "short")
        divides = any(" / " in target["expr"] or "histogram_quantile" in target["expr"] for target in panel["targets"])
        assert divides == ("nan" in [each["options"]["match"] for each in defaults.get("mappings", ())])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        sources: list[Any] = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    used = {name for target in TARGETS for name in re.findall(r"\$(\w+)", target["expr"])}
    assert variables.keys() | {"__rate_interval"} == used | {"datasource"}


def test_the_variables_are_labels(scraped: Scraped) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", variable["query"])
            assert match is not None
            assert variable["name"] == match.group(3)
            assert all(match.group(3) in sample.keys() | OF_PROMETHEUS for sample in scraped.samples[match.group(1)])
