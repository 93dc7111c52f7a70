"""Credentials of a profile of Amazon's tools (AWS_PROFILE, ~/.aws): keys, SSO, roles and programs, found by boto3."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError
from moetier.tiers.redaction import redacted, redacted_error

# boto3 renews temporary credentials ten minutes before they expire, so those that it gives are valid for as long
LIFE = timedelta(minutes=10)
_GIVEN = ("AWS_ACCESS_KEY", "AWS_WEB_IDENTITY", "AWS_CONTAINER", "AWS_SKIP_SIGNATURE")


def profile(address: str) -> dict[str, Any]:
    """Return options of obstore's store at ``address`` for the profile of the user; {} if obstore needs none.

    obstore itself finds credentials in variables, web identities, containers and instances. Raises ConfigError if the
    profile can't be used, or needs boto3, which is not installed.
    """
    home = Path(os.path.expanduser("~/.aws"))  # noqa: PTH111 - Path.home() fails without a home folder
    files = {
        "AWS_SHARED_CREDENTIALS_FILE": home / "credentials",
        "AWS_CONFIG_FILE": home / "config",
    }
    exist = [Path(os.environ.get(name, path)).expanduser().is_file() for name, path in files.items()]
    named = os.environ.get("AWS_PROFILE", "")
    if any(name.startswith(_GIVEN) for name in os.environ) or not (named or any(exist)):
        return {}
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if not named and not exist[0]:  # a config file alone may just name a region
            return {}
        raise ConfigError(
            f"{address} needs boto3, which is not installed, for {f'the profile {named}' if named else 'a profile'}.",
            'In the repository of moetier, run: pip install ".[objects,aws]". Or set AWS_ACCESS_KEY_ID and '
            "AWS_SECRET_ACCESS_KEY.",
        ) from None
    try:
        session = boto3.Session(region_name=os.environ.get("AWS_REGION"))  # which boto3 does not read
        credentials = session.get_credentials()
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"The profile {named or 'default'} can't be used for {address}: {redacted(str(error))}",
            "Correct the files in ~/.aws, or choose another profile with AWS_PROFILE.",
        ) from redacted_error(error)
    if credentials is None:
        return {"region": session.region_name} if session.region_name else {}
    return {"credential_provider": Boto3CredentialProvider(session, ttl=LIFE)}
