"""``moetier cache`` and ``moetier serve --kv-cache-dir``: a server that is started again, or killed, has its pages."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

from http_servers import KEY, ServerProcess
from prometheus import scrape
from readers import PATIENCE
from threads import wait_until

from moetier.runtime.engine.pages.page_folder import entries
from moetier.tools.main import main

PROMPT = "La mattina seguente, don Rodrigo si destò don Rodrigo. " * 12
OPTIONS = ["--name", "small", "--daemon", "none", "--context", "600"]


def served(directory: Path, place: Path, pages: Path, *options: str) -> ServerProcess:
    place.mkdir()
    return ServerProcess(directory, place, [*OPTIONS, "--kv-cache-dir", str(pages), *options])


def answer(server: ServerProcess) -> tuple[str, int]:
    with server.client() as client:
        done = client.completions.create(model="small", prompt=PROMPT, max_tokens=24, temperature=0)
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    return done.choices[0].text, done.usage.prompt_tokens_details.cached_tokens or 0


def test_a_server_finds_its_pages_again(tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "pages"
    server = served(tinymix_4bit, tmp_path / "first", pages, "--kv-cache-disk", "1GiB", "--kv-cache-ttl", "2")
    try:
        assert f"\n  keys and values are kept in {pages}: at most 1 GiB, for 2 days\n" in server.said
        text, cached = answer(server)
        assert not cached
        wait_until(lambda: 'moetier_serve_disk_written_bytes_total{model="small"} 0.0' not in metrics(server))
        assert server.stop() == 0
        said = (tmp_path / "first" / "said").read_text()
        assert re.search(rf"\nkeys and values: .* written to {pages}, 0 B read from there\n$", said)
    finally:
        server.end()
    assert main(["cache", "list", str(pages)]) == 0
    assert re.search(r"\ntinymix\S* +\S+ \w+ +\d+ +\d{4}-", capsys.readouterr().out)
    server = served(tinymix_4bit, tmp_path / "second", pages)
    try:
        again, cached = answer(server)
        assert again == text
        assert cached == 64 * cached_pages(server) > 0
        assert 'moetier_serve_disk_damaged_files_total{model="small"} 0.0' in metrics(server)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(PATIENCE)
    finally:
        server.end()
    assert main(["cache", "clear", str(pages)]) == 0
    assert re.search(r"^\d+ files removed, ", capsys.readouterr().out)
    assert not [*entries(pages)]
    assert main(["cache", "list", str(pages)]) == 0
    assert capsys.readouterr().out == f"There are no keys and values in {pages}.\n"


def metrics(server: ServerProcess) -> str:
    return scrape(server.url + "/metrics", KEY)


def cached_pages(server: ServerProcess) -> int:
    (pages,) = re.findall(r'moetier_serve_disk_pages_total\{model="small"\} (\S+)', metrics(server))
    return int(float(pages))


def test_a_folder_that_others_may_enter_is_refused(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages").chmod(0o755)
    assert main(["serve", str(tinymix_4bit), "--port", "0", "--kv-cache-dir", str(tmp_path / "pages")]) == 1
    assert capsys.readouterr().err == (
        f"moetier: {tmp_path}/pages is open to other users.\n  Close it: chmod 700 {tmp_path}/pages\n"
    )
    assert main(["cache", "clear", str(tmp_path / "pages")]) == 1
    assert main(["cache", "list", str(tmp_path / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--kv-cache-disk", "much"], ["--kv-cache-ttl", "0"], ["--kv-cache-ttl", "week"]])
def test_values_that_cannot_be_are_refused(tinymix_4bit: Path, given: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", str(tinymix_4bit), *given])
    assert end.value.code == 2
