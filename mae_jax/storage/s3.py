"""Data on s3://: the check before a run, and errors as one line each.

Files are read by s3fs. Credentials, region and endpoint come from AWS's settings (AWS_PROFILE, AWS_ENDPOINT_URL ...).
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import fsspec
from botocore import exceptions

from mae_jax.errors import UserError
from mae_jax.runtime import threads

CHECK_SECONDS = 12.0  # timeout of `check`, including retries and the search for credentials
LIMITS = {"connect_timeout": 5, "read_timeout": 30, "retries": {"mode": "standard", "max_attempts": 4}}
# Of `check`: with four attempts a connection that is refused was told after 11.6 s, with two after 1.4 s.
CHECK_RETRIES = {"mode": "standard", "max_attempts": 2}


def check(path: str) -> None:
    """Checks within seconds that a bucket can be listed; raises UserError with the path and a hint otherwise."""
    _prepare()
    looking = threads.start(lambda: plainly(path, lambda: _look(path)))
    if not threads.ends(looking, CHECK_SECONDS):
        raise UserError(f"{path}: no answer within {CHECK_SECONDS:g} s; is there a network, and is the endpoint right "
                        "(AWS_ENDPOINT_URL)?")
    try:
        looking.result()
    except OSError as error:
        raise UserError(str(error)) from None


def plainly(path: str, action: Callable[[], Any]) -> Any:
    """Returns `action()`; converts a bucket's errors to an OSError of one line, except FileNotFoundError."""
    try:
        return action()
    except FileNotFoundError:
        raise
    except (OSError, exceptions.BotoCoreError, exceptions.ClientError) as error:
        raise OSError(_told(path, error)) from None


def _look(path: str) -> None:
    bucket, _, inside = path.removeprefix("s3://").partition("/")
    settings = fsspec.config.conf["s3"]["config_kwargs"]
    system = fsspec.filesystem("s3", config_kwargs=settings | {"retries": CHECK_RETRIES})
    try:
        system.call_s3("list_objects_v2", Bucket=bucket, Prefix=inside, MaxKeys=1)
    except FileNotFoundError:
        raise OSError(f"{path}: there is no bucket s3://{bucket}; check its name, or run: aws s3 mb s3://{bucket}"
                      ) from None


def _told(path: str, error: BaseException) -> str:
    """Returns the message of an error, with a hint."""
    bucket, said = f"s3://{path.removeprefix('s3://').partition('/')[0]}", " ".join(str(error).split())[:300]
    if said.startswith(path):
        return said
    if isinstance(error, PermissionError):
        return f"{path}: access denied ({said}); the account needs s3:ListBucket and s3:GetObject on {bucket}"
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return f"{path}: no valid credentials ({said}); run: aws configure, or for public data set FSSPEC_S3_ANON=true"
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError | ConnectionError | TimeoutError):
        return f"{path}: {bucket} cannot be reached ({type(error).__name__}: {said}); is there a network?"
    return f"{path}: {bucket} answers with {said}"


@functools.cache
def _prepare() -> None:
    """Sets timeouts of s3fs, and silences logs whose content the messages here have."""
    for name in ("s3fs", "fsspec", "aiobotocore", "botocore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = fsspec.config.conf.setdefault("s3", {})
    settings |= {"use_listings_cache": False, "config_kwargs": LIMITS | settings.get("config_kwargs", {})}
    if isinstance(settings.get("anon"), str):
        settings["anon"] = settings["anon"].lower() == "true"
