"""Addresses of models in object stores. An address with a secret is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from .errors import ConfigError
from .redaction import USER

ADDRESS = re.compile(r"(s3|gs|az|https?|file)://\S+")
HTTP_AUTHORIZATION = "MOETIER_HTTP_AUTHORIZATION"  # variable: value of the header Authorization for https://
# variables that name another endpoint than the provider's own
ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_HTTP_FIX = (
    f"Set {HTTP_AUTHORIZATION} to the value of a header, such as 'Bearer TOKEN'. A signed address of a bucket becomes "
    "s3://, gs:// or az://, with the provider's own variables."
)
_FIXES = {  # what to use in place of a secret in an address
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to the file of an account.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_ACCOUNT_KEY.",
    "http": _HTTP_FIX,
    "https": _HTTP_FIX,
    "file": "Give the path alone.",
}
_HOST = r"(\[[0-9a-fA-F:.%]*\]|[^:@]*)"
_PORT = r"(:\d{0,5})?"


def check_address(address: str) -> None:
    """Raise ConfigError for an address with user information or a query, which may be secrets.

    Addresses are printed, name folders, and are arguments of processes. The error does not quote them. The endpoint
    that the environment names for the address is checked, too.
    """
    scheme = address.partition("://")[0]
    fix = _FIXES.get(scheme, "Give an address without them.")
    for fault in _faults(address, with_port=scheme in ("http", "https")):
        raise ConfigError(f"An address of {scheme}:// has {fault}, which moetier does not accept.", fix)
    if variable := endpoint_variable(address):
        for fault in _faults(os.environ[variable], with_port=True):
            raise ConfigError(f"The endpoint in {variable} has {fault}, which moetier does not accept.", fix)


def _faults(address: str, *, with_port: bool) -> Iterator[str]:
    """Yield what an address has, and must not have."""
    host = re.split(r"[/?#]", address.partition("://")[2], maxsplit=1)[0]
    if not re.fullmatch(_HOST + (_PORT if with_port else ""), host) or USER.search(address):
        yield "user information (such as USER:PASSWORD@)"
    if "?" in address or "#" in address:
        yield "a query (?…) or a fragment (#…)"


def endpoint_variable(address: str) -> str:
    """Return the variable of the environment that names the endpoint of an address; "" if none does."""
    return next(filter(os.environ.get, ENDPOINTS.get(address.partition(":")[0], ())), "")


def endpoint_of(address: str) -> str:
    """Return the endpoint that the environment names for an address; "" for the provider's own."""
    variable = endpoint_variable(address)
    return os.environ[variable] if variable else ""
