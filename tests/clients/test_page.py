"""The page of `moetier serve` in Debian's chromium: a real server, whose model's answers come from a script."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
from agent_model import write_model
from agents import npm_packages
from browser import ENTER, ESCAPE, SHIFT, Browser, browsing, programs
from http_servers import KEY, ServerProcess
from page_script import HOSTILE, SCRIPT, SHORT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HELPERS = Path(__file__).parent.parent / "helpers"
AXE = "axe-core@4.10.3"
READY = "!document.getElementById('app').hidden && document.getElementById('model').value"
IDLE = "!document.body.classList.contains('running')"
ANSWERS = "[...document.querySelectorAll('article.assistant .body')].map((body) => body.innerText)"
QUESTIONS = "[...document.querySelectorAll('article.user .body')].map((body) => body.innerText)"


@pytest.fixture(scope="module")
def model(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    programs()
    return write_model(tmp_path_factory.mktemp("page") / "model", tinymix)


def start(model: Path, place: Path, *arguments: str, key: str = "") -> ServerProcess:
    (place / "script").write_text(json.dumps(SCRIPT))
    under = [str(HELPERS / "scripted_server.py"), str(place / "script"), str(place / "record")]
    return ServerProcess(model, place, ["--name", "tiny", "--daemon", "none", *arguments], under=under, key=key)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(model: Path, place: Path) -> Iterator[ServerProcess]:
    """A server without a key."""
    made = start(model, place)
    yield made
    assert made.stop() == 0


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path) as made:
        yield made
        assert made.console() == []


@pytest.fixture(scope="module")
def axe(request: pytest.FixtureRequest) -> str:
    """The source of axe-core."""
    folder = npm_packages(request.config.cache.mkdir("axe") / AXE, [AXE])
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


def violations(browser: Browser, axe: str) -> list[Any]:
    browser.run(axe)
    found = browser.run("return axe.run(document)")
    assert len(found["passes"]) > 20
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]


def say(browser: Browser, text: str) -> None:
    browser.type("#input", text + ENTER)


def bodies(place: Path) -> list[dict[str, Any]]:
    """The bodies of all requests that have ended."""
    lines = (json.loads(line) for line in (place / "record").read_text().splitlines())
    return [line["body"] for line in lines if line["path"] == "/v1/chat/completions"]


def test_a_conversation(server: ServerProcess, place: Path, browser: Browser, axe: str) -> None:
    browser.go(server.url)
    browser.wait(READY)
    assert violations(browser, axe) == []

    say(browser, "Why does each block have a cache?")
    browser.wait(f"{ANSWERS}[0] && {IDLE}")
    first = browser.run(f"return {ANSWERS}")
    assert "Why a cache for each block" in first[0]
    assert "The reader wants" not in browser.text("article.assistant")  # folded
    browser.click("article.assistant summary")
    assert "The reader wants" in browser.text("article.assistant")
    assert browser.run("return document.querySelectorAll('pre .keyword').length") >= 4
    assert browser.run("return document.querySelector('td.right').innerText") == "41.2 %"
    link = "const link = document.querySelector('.prose a'); return [link.href, link.rel]"
    assert browser.run(link) == ["https://arxiv.org/abs/2312.17238", "noopener noreferrer"]
    assert re.search(
        r"\d+ tokens · [\d.]+ tokens/s · first after .* host [\d.]+ %, disk", browser.text(".assistant .meta")
    )
    assert re.search(r"Experts: host [\d.]+ %, disk [\d.]+ %\s+[\d.]+ tokens/s", browser.text("#status"))
    for scheme in ("light", "dark"):
        browser.colours(scheme)
        assert violations(browser, axe) == []

    # stop by the key, and by the button
    for stop in (lambda: browser.press(ESCAPE), lambda: browser.click("#stop")):
        say(browser, "[long]")
        browser.wait("document.querySelector('article.running .body').innerText.length > 200")
        stop()
        browser.wait(IDLE)
        assert "stopped" in browser.text("article:last-child .meta")
    stopped = browser.run(f"return {ANSWERS}")
    assert all(200 < len(text) < 7000 for text in stopped[1:])

    # another version of the last answer, and the former one again
    browser.click("article:last-child [data-action=regenerate]")
    browser.wait("document.querySelector('article:last-child .body').innerText.length > 200")
    browser.press(ESCAPE)
    browser.wait(IDLE)
    assert browser.text("article:last-child .count") == "2 of 2"
    browser.click("article:last-child [data-action=previous]")
    browser.wait("document.querySelector('article:last-child .count').innerText === '1 of 2'")
    assert browser.run(f"return {ANSWERS}") == stopped

    # an edited question is another branch
    browser.run("document.querySelector('article.user [data-action=edit]').click()")
    browser.run("document.querySelector('.edit textarea').select()")
    browser.type(".edit textarea", "What about the budget?" + ENTER)
    browser.wait(f"{ANSWERS}.length === 1 && {IDLE}")
    assert browser.run(f"return {ANSWERS}") == [SHORT]
    assert browser.text("article.user .count") == "2 of 2"

    # the settings, by keys; a message of several lines; all of it after a reload
    browser.click("#open-settings")
    browser.type("#system", "Be short.")
    browser.type("#set-temperature", "0.5")
    browser.type("#set-max_tokens", "60")
    assert violations(browser, axe) == []
    browser.click("#settings-form .primary")
    browser.type("#input", "two")
    browser.press(SHIFT + ENTER)
    say(browser, "budget lines")
    browser.wait(f"{ANSWERS}.length === 2 && {IDLE}")
    *_, body = bodies(place)
    assert [(each["role"], each["content"]) for each in body["messages"]] == [
        ("system", "Be short."),
        ("user", "What about the budget?"),
        ("assistant", SHORT),
        ("user", "two\nbudget lines"),
    ]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.5, 60, "tiny")
    shown = browser.run(f"return [{QUESTIONS}, {ANSWERS}]")
    browser.reload()
    browser.wait(f"{READY} && {ANSWERS}.length === 2")
    assert browser.run(f"return [{QUESTIONS}, {ANSWERS}]") == shown
    browser.click("article.user [data-action=previous]")
    browser.wait(f"{ANSWERS}.length === 3")
    assert browser.run(f"return {ANSWERS}")[:1] == first


def test_a_reload_within_an_answer_keeps_what_there_is(server: ServerProcess, browser: Browser) -> None:
    browser.go(server.url)
    browser.wait(READY)
    say(browser, "[long] reload")
    browser.wait("document.querySelector('article.running .body').innerText.length > 1000")
    browser.reload()
    browser.wait(f"{READY} && {ANSWERS}[0].length > 100")
    assert "unfinished" in browser.text("article:last-child .meta")
    say(browser, "And the budget?")
    browser.wait(f"{ANSWERS}[1]?.length > 0 && {IDLE}")
    assert browser.run(f"return {ANSWERS}[1]") == SHORT


def test_a_long_prompt_shows_its_progress(server: ServerProcess, browser: Browser) -> None:
    browser.go(server.url)
    browser.wait(READY)
    browser.run("document.getElementById('input').value = 'So many words of a question. '.repeat(4000)")
    browser.click("#send")
    browser.wait("/Reading the prompt: [\\d,]+ of [\\d,]+ tokens/.test(document.getElementById('phase').innerText)")
    assert browser.run("return document.getElementById('prompt').hidden") is False
    browser.press(ESCAPE)
    browser.wait(IDLE)


def test_two_tabs_lose_nothing(server: ServerProcess, browser: Browser) -> None:
    browser.go(server.url)
    browser.wait(READY)
    say(browser, "First, the budget.")
    browser.wait(f"{ANSWERS}[0] && {IDLE}")
    one, address = browser.tab, browser.run("return location.href")
    two = browser.open_tab(address)
    browser.wait(f"{READY} && {ANSWERS}.length === 1")
    say(browser, "[long] in the second tab")
    browser.switch(one)
    say(browser, "Why does the first tab ask meanwhile?")
    browser.wait(f"{ANSWERS}.at(-1).includes('for your machine') && {IDLE}")
    browser.switch(two)
    browser.wait("document.querySelector('article.running .body').innerText.length > 100")
    browser.press(ESCAPE)
    browser.wait(IDLE)
    script = """
        return import("/page/store.js").then(async ({ Store }) => {
            const store = await Store.open();
            return store.messages(location.hash.slice(1));
        });
    """
    saved = {message["id"]: message for message in browser.run(script)}
    answers = {saved[each["parent"]]["content"]: each["content"] for each in saved.values() if each["parent"] in saved}
    assert answers["First, the budget."] == SHORT
    assert answers["[long] in the second tab"].startswith("It goes on and on.")
    assert answers["Why does the first tab ask meanwhile?"].endswith("for your machine.")

    # a new conversation in one tab is in the list of the other; a removed one is gone from both, and can be restored
    browser.click("#new")
    say(browser, "Another budget")
    browser.wait(f"{ANSWERS}[0] && {IDLE}")
    browser.switch(one)
    browser.wait("document.querySelectorAll('#conversations li').length === 2")
    browser.switch(two)
    browser.run("document.querySelector(`#conversations [aria-label*='First']`).click()")
    browser.wait("!document.getElementById('toast').hidden")
    browser.switch(one)
    browser.wait("document.getElementById('toast').innerText.includes('deleted in another tab')")
    assert browser.run(f"return {QUESTIONS}") == []
    browser.switch(two)
    browser.click("#toast-undo")
    browser.wait("document.querySelectorAll('#conversations li').length === 2")
    browser.go(address)
    browser.wait(f"{QUESTIONS}[0] === 'First, the budget.'")


def test_a_server_goes_and_returns(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    servers = [start(model, tmp_path, "--port", port)]
    try:
        with browsing(tmp_path) as browser:
            browser.go(servers[0].url)
            browser.wait(READY)
            say(browser, "[long]")
            browser.wait("document.querySelector('article.running .body').innerText.length > 200")
            servers[0].process.send_signal(signal.SIGKILL)
            browser.wait(IDLE)
            assert "The connection to the server was lost." in browser.text("article:last-child .error")
            browser.wait("document.getElementById('notice').innerText.includes('Trying again')")
            kept = browser.run(f"return {ANSWERS}[0].length")
            say(browser, "And the budget?")  # while it is gone
            browser.wait(f"{ANSWERS}.length === 2 && {IDLE}")
            assert "The connection to the server was lost." in browser.text("article:last-child .error")
            servers.append(start(model, tmp_path, "--port", port))
            browser.wait("document.getElementById('notice').hidden")
            browser.click("article:last-child [data-action=regenerate]")
            browser.wait(f"{ANSWERS}[1] && {IDLE}")
            assert browser.run(f"return {ANSWERS}[1]") == SHORT
            assert browser.run(f"return {ANSWERS}[0].length") == kept > 200
            # the browser itself reports what could not be fetched
            assert all("net::ERR_" in line for line in browser.console())
    finally:
        for each in servers:
            each.end()


def test_a_key_is_asked_for_and_stays_in_the_tab(model: Path, tmp_path: Path, axe: str) -> None:
    server = start(model, tmp_path, key=KEY)
    try:
        assert httpx2.get(f"{server.url}/v1/models").status_code == 401
        with browsing(tmp_path) as browser:
            browser.go(server.url)
            browser.wait("!document.getElementById('gate').hidden")
            assert browser.run("return document.getElementById('app').hidden") is True
            assert violations(browser, axe) == []
            browser.type("#key", "ключ" + ENTER)  # no header can hold it
            browser.wait("document.getElementById('key-error').innerText")
            browser.type("#key", "wrong" + ENTER)
            browser.wait("document.getElementById('key-error').innerText")
            browser.type("#key", KEY + ENTER)
            browser.wait(READY)
            say(browser, "What about the budget?")
            browser.wait(f"{ANSWERS}[0] && {IDLE}")
            assert browser.run("return Object.values(sessionStorage)").count(KEY) == 1
            assert KEY not in browser.run("return JSON.stringify(localStorage) + location.href + document.cookie")
            urls = browser.run("return performance.getEntriesByType('resource').map((each) => each.name)")
            assert not any(KEY in url for url in urls)
            browser.reload()
            browser.wait(READY)
            browser.open_tab(server.url)
            browser.wait("!document.getElementById('gate').hidden")
            # the browser itself reports what was refused
            assert all("401 (Unauthorized)" in line for line in browser.console())
    finally:
        server.end()


def test_markup_in_an_answer_is_text(server: ServerProcess, browser: Browser, axe: str) -> None:
    browser.go(server.url)
    browser.wait(READY)
    say(browser, "[hostile] <b>question</b>")
    browser.wait(f"{ANSWERS}[0] && {IDLE}")
    assert browser.run(f"return {QUESTIONS}") == ["[hostile] <b>question</b>"]
    shown = browser.text("article.assistant .body")
    for line in HOSTILE.splitlines():
        if line.startswith(("<script", "[a link", "</code")):
            assert line in shown
    assert "&lt;b&gt;" in shown
    tags = browser.run("return [...document.querySelectorAll('.body *')].map((each) => each.tagName)")
    assert not {"SCRIPT", "IMG", "IFRAME", "B", "I"} & set(tags)
    addresses = browser.run("return [...document.querySelectorAll('.body a')].map((each) => each.href)")
    assert all(address.startswith("https://example.com") for address in addresses)
    assert "owned" not in browser.run("return document.title")
    asked = browser.run("return performance.getEntriesByType('resource').map((each) => new URL(each.name).origin)")
    assert set(asked) == {server.url}
    assert violations(browser, axe) == []
    refused = "try { document.body.innerHTML = 'x'; return false } catch (error) { return error instanceof TypeError }"
    assert browser.run(refused) is True  # by the policy, whatever the page's code does
    assert any("TrustedHTML" in line for line in browser.console())


HARD = (  # texts for which a careless parser takes quadratic or exponential time
    "*a " * 30_000, "**a" * 30_000, "_" * 90_000, "`" * 90_000, "".join("`" * n + " " for n in range(400)),
    "[" * 90_000, "[a](" * 30_000, "[a](https://b" * 10_000, "> " * 40_000, "- " * 40_000, "1. " * 30_000,
    "|" * 90_000 + "\n|-|", "# " * 40_000, "- a\n" * 20_000, "  " * 40_000 + "x", "http://" * 20_000,
    "<http://" * 20_000, "```c\n" + "/*" * 20_000, "```python\n" + '"""' * 15_000, "\\" * 90_000, "~~a" * 30_000,
    "```" + " " * 90_000 + "`", "~" * 90_000 + "`",
)  # fmt: skip


def test_no_text_makes_the_page_slow_or_loses_a_letter(server: ServerProcess, browser: Browser) -> None:
    browser.go(server.url)
    browser.wait(READY)
    script = """
        const [text] = arguments;
        return import("/page/markdown.js").then(({ showMarkdown }) => {
            const place = document.createElement("div");
            const begun = performance.now();
            showMarkdown(place, text);
            return [performance.now() - begun, place.textContent];
        });
    """
    for text in HARD:
        milliseconds, shown = browser.run(script, text)
        assert milliseconds < 20_000, text[:20]
        assert shown.count("a") >= text.count("a"), text[:20]


def test_a_phone(server: ServerProcess, browser: Browser, axe: str) -> None:
    for width in (320, 390):
        browser.size(width, 700, phone=True)
        browser.go(server.url)
        browser.wait(READY)
        say(browser, "Why does a phone ask?")
        browser.wait(f"{ANSWERS}[0] && {IDLE}")
        assert browser.run("return document.documentElement.scrollWidth") == width
        beyond = """return [...document.querySelectorAll('#talk *')].filter((each) => {
            const { right, width } = each.getBoundingClientRect();
            return width > 0 && right > innerWidth + 1 && !each.closest('pre, .table');
        }).length"""
        assert browser.run(beyond) == 0
        assert violations(browser, axe) == []
        browser.click("#open-side")
        browser.wait("document.getElementById('side').getBoundingClientRect().left === 0")
        browser.click("#new")
        browser.wait(f"{QUESTIONS}.length === 0")
