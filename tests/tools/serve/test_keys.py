"""Keys of a server: files of them, how requests show them, and what each may use."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
from http_servers import answering, application, listening
from readers import PATIENCE

import moetier
from moetier.tiers.errors import ConfigError
from moetier.tools.serve.keys import Key, RateLimits, digest_of, keys_of

FILE = """
[anna]
key = "a-key"
requests_a_minute = 2

["Bert & Co"]
key = "b-key"
tokens_a_minute = 1_000
"""


def file_of(folder: Path, text: str) -> Path:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_file_has_keys_with_names_and_limits(tmp_path: Path) -> None:
    keys = keys_of(None, file_of(tmp_path, FILE))
    assert keys is not None
    assert keys.names == ["anna", "Bert & Co"]
    assert keys.shown_by({b"authorization": b"Bearer a-key"}) == Key("anna", digest_of(b"a-key"), 2, None)
    assert keys.shown_by({b"x-api-key": b"b-key"}) == Key("Bert & Co", digest_of(b"b-key"), None, 1000)
    assert keys.shown_by({b"x-api-key": b"none", b"authorization": b"bearer b-key"}) is not None
    for headers in ({}, {b"x-api-key": b""}, {b"authorization": b"Basic a-key"}, {b"authorization": b"Bearer A-key"}):
        assert keys.shown_by(headers) is None


def test_one_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETIER_API_KEY", "from-there")
    one = keys_of(file_of(tmp_path, "from-here\n"), None)
    other = keys_of(None, None)
    assert one is not None
    assert other is not None
    assert one.shown_by({b"x-api-key": b"from-here"}) == Key("", digest_of(b"from-here"))
    assert other.shown_by({b"x-api-key": b"from-there"}) == Key("", digest_of(b"from-there"))
    monkeypatch.delenv("MOETIER_API_KEY")
    assert keys_of(None, None) is None
    with pytest.raises(ConfigError, match="Give one of the two"):
        keys_of(tmp_path / "keys.toml", tmp_path / "keys.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("[anna", "is not TOML"),
        ("anna = 1", "is not a table"),
        ('[""]\nkey = "a"', "is not a table with a printable name"),
        ("[anna]", "is not one word"),
        ('[anna]\nkey = "a b"', "is not one word"),
        ('[anna]\nkey = "a"\nlimit = 1', "unknown field 'limit'"),
        ('[anna]\nkey = "a"\ntokens_a_minute = 0', "a limit that is not a whole number above 0"),
        ('[anna]\nkey = "a"\nrequests_a_minute = true', "a limit that is not a whole number above 0"),
        ('[anna]\nkey = "a"\n[bert]\nkey = "a"', "the same key twice"),
    ],
)
def test_a_file_that_has_no_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keys_of(None, file_of(tmp_path, text))


def test_limits_are_those_of_a_minute() -> None:
    now, used = [0.0], {"anna": 0, "bert": 0}
    limits = RateLimits(used.__getitem__, lambda: now[0])
    anna, bert = Key("anna", b"", requests=2), Key("bert", b"", tokens=60)
    assert [limits.admit(anna) for _ in range(3)] == [None, None, ("2 requests", 30)]
    assert limits.admit(bert) is None, "a key's limits are its own"
    now[0] += 30
    assert [limits.admit(anna) for _ in range(2)] == [None, ("2 requests", 30)]
    used["bert"] = 100
    assert limits.admit(bert) == ("60 tokens", 41), "of 60 there are 40 too many, and one is needed"
    now[0] += 41
    assert limits.admit(bert) is None
    now[0] += 1000
    assert [limits.admit(anna) for _ in range(3)] == [None, None, ("2 requests", 30)], "no more than one minute's"


def test_keys_share_no_keys_and_values_and_have_metrics_of_their_own(tinymix_4bit: Path, tmp_path: Path) -> None:
    """And who has used up what a key may is refused before the body is read."""
    text = FILE.replace("requests_a_minute = 2", "requests_a_minute = 4")
    keys = keys_of(None, file_of(tmp_path, text))
    assert keys is not None
    model, tokenizer = moetier.load(tinymix_4bit, daemon=None)
    with (
        model.tiers,
        answering(model, tokenizer, context=400) as service,
        listening(application("small", service, keys, 8)) as url,
        httpx2.Client(base_url=url, timeout=PATIENCE) as client,
    ):

        def ask(key: str, **fields: object) -> httpx2.Response:
            body = {"prompt": "La mattina seguente, " * 20, "max_tokens": 3} | fields
            return client.post("/v1/completions", json=body, headers={"x-api-key": key})

        def cached(key: str) -> int:
            count: int = ask(key).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return count

        assert cached("a-key") == 0
        assert cached("a-key") > 64
        assert cached("b-key") == 0, "what others have sent is not seen"
        assert ask("c-key").status_code == 401
        metrics = client.get("/metrics", headers={"x-api-key": "a-key"}).text
        assert 'moetier_serve_new_tokens_total{key="anna",model="small"} 6.0' in metrics
        assert 'moetier_serve_new_tokens_total{key="Bert & Co",model="small"} 3.0' in metrics
        for name in "queue_seconds", "first_token_seconds", "token_seconds", "request_new_tokens":
            assert f'moetier_serve_{name}_count{{key="anna",model="small"}} 2.0' in metrics
        assert 'moetier_serve_request_new_tokens_bucket{key="anna",le="4.0",model="small"} 2.0' in metrics
        assert [ask("a-key").status_code for _ in range(2)] == [200, 200]
        refused = ask("a-key", max_tokens="x")  # its body would be refused
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 0 < int(refused.headers["retry-after"]) <= 15
        used = service.tally.used_tokens("Bert & Co")
        several = ask("b-key", n=3).json()["usage"]["total_tokens"]
        assert service.tally.used_tokens("Bert & Co") - used == several, "a prompt counts once, whatever its answers"
        while (last := ask("b-key")).status_code == 200:
            pass
        assert last.status_code == 429
        assert "1,000 tokens a minute" in last.json()["error"]["message"]
