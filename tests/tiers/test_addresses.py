"""Addresses without secrets, and texts in which none is left."""

from __future__ import annotations

import re
import traceback

import pytest

from moetier.tiers.addresses import check_address
from moetier.tiers.errors import ConfigError
from moetier.tiers.redaction import redacted, redacted_error

SECRETS = (
    "https://user:SECRET@host/model",
    "https://SECRET@host/model",
    "https://user:12SECRET/x@host/model",
    "http://user:SECRET@127.0.0.1:8000/model",
    "s3://KEY:SECRET@bucket/model",
    "s3://KEY:SEC/SECRET@bucket/model",
    "gs://KEY:SECRET@bucket/model",
    "https://host/model?sig=SECRET",
    "https://host:443/model?a=b&sig=SECRET",
    "az://container/model?sv=1&sig=SECRET",
)


@pytest.mark.parametrize("address", [*SECRETS, "https://host/model#SECRET", "s3://KEY:SECRET"])
def test_an_address_with_secrets_is_refused_and_not_quoted(address: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_address(address)
    assert "SECRET" not in str(error.value).replace("AWS_SECRET_ACCESS_KEY", "")


@pytest.mark.parametrize(
    ("address", "variable"),
    [
        ("s3://KEY:SECRET@bucket/model", "AWS_ACCESS_KEY_ID"),
        ("gs://KEY:SECRET@bucket/model", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://container/model?sig=SECRET", "AZURE_STORAGE_SAS_TOKEN"),
        ("https://user:SECRET@host/model", "MOETIER_HTTP_AUTHORIZATION"),
    ],
)
def test_the_variable_to_use_instead_is_named(address: str, variable: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_address(address)
    assert variable in error.value.fix


@pytest.mark.parametrize(
    "address",
    [
        *("s3://bucket/model", "s3://bucket/model@v2", "gs://bucket/a/b", "az://container/model"),
        *("file:///folder/model", "https://host/model", "http://127.0.0.1:8000/model", "http://[::1]:8000"),
    ],
)
def test_other_addresses_are_accepted_and_printed(address: str) -> None:
    check_address(address)
    for text in (address, f"GET '{address}' failed", f"{address}: 3 s"):
        assert redacted(text) == text


@pytest.mark.parametrize("address", [*SECRETS, *(each.replace("://", ":/") for each in SECRETS)])
@pytest.mark.parametrize("text", ["{}", "Error performing GET {} in 1ms - no", '<a href="{}">', "({})"])
def test_no_secret_is_left_in_a_text(address: str, text: str) -> None:
    found = redacted(text.format(address))
    assert "SECRET" not in found
    assert found.startswith(text.partition("{}")[0] + re.match(r"\w+:/+", address)[0])  # type: ignore[index]
    assert found.endswith(text.partition("{}")[2])


@pytest.mark.parametrize(
    "address",
    [
        *('https://host/x?sig=a"SECRET', "https://host/x?sig='SECRET'", "https://host/x?a=<SECRET>", "s3:/K:SECRET@b"),
        *(
            "https://host/x?a=(b)SECRET)SECRET",
            "https://host/a'b?sig=SECRET",
            "user:SECRET@host",
            "user:SEC/SECRET@host",
        ),
    ],
)
@pytest.mark.parametrize("text", ["{}", "{} is no id", "{!r} is no id", "There is no folder {}.", "no folder /here/{}"])
def test_no_secret_is_left_of_what_a_user_may_type(address: str, text: str) -> None:
    assert "SECRET" not in redacted(text.format(address))


def test_no_secret_is_left_in_a_traceback() -> None:
    try:
        try:
            raise OSError("GET https://user:SECRET@host/?sig=SECRET: no")
        except OSError as error:
            raise ConfigError("cause", "fix") from redacted_error(error)
    except ConfigError as error:
        said = "".join(traceback.format_exception(error))
    assert "OSError: GET https://***@host/?***" in said
    assert "SECRET" not in said.replace('raise OSError("GET https://user:SECRET@host/?sig=SECRET: no")', "")
