"""Objects in gs:// buckets: the check before a run, and small files, with deadlines of seconds.

Checkpoints go through orbax, and thus through gcsfs and TensorStore, which retry for many minutes. The check must
report within seconds, and the files that the training loop writes (metrics, figures, the lease) must not delay it. This
module uses google-cloud-storage, which verifies downloads by the bucket's checksums.
"""

import contextlib
import functools
import logging
import mimetypes
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import fsspec.config
import requests
from google.api_core import exceptions
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, InvalidOperation
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY

from mae_jax.errors import UserError
from mae_jax.runtime import threads

CHECK_SECONDS = 8.0  # timeout of `check`, including retries and the search for credentials
RETRY_SECONDS = 60.0  # seconds of retries for operations that must not fail
TIMEOUT = (4.0, 8.0)  # timeouts of a request in seconds: to connect, and between bytes
ADDRESSES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "API_ENDPOINT_OVERRIDE")
ROLE = "roles/storage.objectAdmin"
FAILURES = (exceptions.GoogleAPIError, GoogleAuthError, requests.RequestException, DataCorruption, InvalidResponse)


class BucketError(OSError):
    """A bucket cannot be reached, read or written; the text is one line with the path and a hint."""


class GenerationMismatch(Exception):
    """An object has another generation than required."""


class StoredObject(NamedTuple):
    """The content of an object, and its generation, a number that changes with each write."""

    content: bytes
    generation: int


def check(path: str) -> None:
    """Checks within seconds that a bucket can be listed; call it before any other use of gs://.

    Raises:
      UserError: it cannot be listed, with the path and a hint; or the environment would send credentials to a host that
        is not Google's.
    """
    _check_addresses()
    _prepare()
    name, inside = _split(path)
    # In a thread, since the searches for credentials and for host addresses have no timeout.
    looking = threads.start(lambda: _plainly(path, lambda: next(iter(_client().list_blobs(
        name, prefix=inside, max_results=1, timeout=TIMEOUT, retry=_retry(CHECK_SECONDS / 2))), None)))
    if not threads.ends(looking, CHECK_SECONDS):
        raise UserError(f"{path}: no answer within {CHECK_SECONDS:g} s; is there a network, and a way to credentials "
                        "(gcloud auth application-default login; on a VM its metadata server)?")
    try:
        looking.result()
    except BucketError as error:
        raise UserError(str(error)) from None


def read(path: str) -> StoredObject | None:
    """Returns an object, or None if it does not exist; raises BucketError."""
    return _plainly(path, lambda: _download(_blob(path)))


def _download(blob: storage.Blob, tries: int = 2) -> StoredObject | None:
    try:
        return StoredObject(blob.download_as_bytes(timeout=TIMEOUT, retry=_retry(RETRY_SECONDS)), blob.generation)
    except (DataCorruption, requests.exceptions.ChunkedEncodingError):  # usually damaged in transfer
        if tries == 1:
            raise
        return _download(blob, tries - 1)
    except exceptions.NotFound as error:
        if "bucket does not exist" in str(error):
            raise
        return None


def names(folder: str, pattern: str = "") -> list[str]:
    """Returns the names of objects and, with a '/' at the end, of folders in a folder; raises BucketError.

    Args:
      folder: gs://bucket/folder.
      pattern: if given, return the paths of objects under the folder that match it, such as '*/done.txt'; `*` does not
        match '/'.
    """
    bucket, inside = _split(f"{folder.rstrip('/')}/")
    how = {"match_glob": inside + pattern} if pattern else {"delimiter": "/"}

    def look() -> list[str]:
        found = _client().list_blobs(bucket, prefix=inside, fields="items(name),prefixes,nextPageToken",
                                     timeout=TIMEOUT, retry=_retry(RETRY_SECONDS), **how)
        objects = [blob.name for blob in found]
        return [name.removeprefix(inside) for name in (*objects, *found.prefixes)]

    return _plainly(folder, look)


def write(path: str, content: bytes, seconds: float = RETRY_SECONDS, generation: int | None = None) -> int:
    """Writes an object atomically; returns its generation.

    Args:
      path: gs://bucket/object.
      content: of the object.
      seconds: of retries; one more request may follow.
      generation: generation of the object that may be replaced; 0: there must be no object; None: any.

    Raises:
      BucketError: the write failed, or its result is unknown.
      GenerationMismatch: the object has another generation.
    """
    blob = _blob(path)
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    _plainly(path, lambda: blob.upload_from_string(
        content, kind, if_generation_match=generation, timeout=(4.0, max(8.0, seconds / 2)), retry=_retry(seconds)))
    return blob.generation


def delete(path: str, generation: int, seconds: float) -> None:
    """Deletes an object with this generation, if it exists; raises BucketError or GenerationMismatch."""
    def remove() -> None:
        with contextlib.suppress(exceptions.NotFound):
            _blob(path).delete(if_generation_match=generation, timeout=seconds, retry=None)

    _plainly(path, remove)


def _plainly(path: str, action: Callable[[], Any]) -> Any:
    """Returns `action()`, and converts the client's exceptions to BucketError and GenerationMismatch."""
    try:
        return action()
    except exceptions.PreconditionFailed as error:
        raise GenerationMismatch(str(error)) from None
    except exceptions.RetryError as error:
        raise BucketError(_told(path, error.cause or error)) from None
    except FAILURES as error:
        raise BucketError(_told(path, error)) from None


def _told(path: str, error: BaseException) -> str:
    """Returns the message of a BucketError, with a hint."""
    bucket = f"gs://{_split(path)[0]}"
    said = " ".join(str(getattr(error, "message", None) or error).split())
    reason = re.search(r'"message": "(.*?)"', said)  # an upload's error holds the whole response
    said = reason[1] if reason else re.sub(r"^[A-Z]+ https?://\S+: |^.*Caused by ", "", said)[:300]
    if isinstance(error, exceptions.NotFound):
        return f"{path}: there is no bucket {bucket}; check its name, or run: gcloud storage buckets create {bucket}"
    if isinstance(error, exceptions.Forbidden):
        return f"{path}: access denied ({said}); the account needs {ROLE} on {bucket}"
    if isinstance(error, exceptions.Unauthorized | GoogleAuthError):
        said = "none were found" if isinstance(error, InvalidOperation) else said
        return (f"{path}: no valid credentials ({said}); run: gcloud auth application-default login, or give the "
                f"machine's service account {ROLE} on {bucket}")
    if isinstance(error, DataCorruption):
        return f"{path}: the downloaded content does not match the bucket's checksum, twice"
    if isinstance(error, exceptions.GoogleAPICallError):
        return f"{path}: {bucket} answers with {error.code}: {said}"
    if isinstance(error, InvalidResponse):
        return f"{path}: {bucket} answers with {error.response.status_code}"
    return f"{path}: {bucket} cannot be reached ({type(error).__name__}: {said}); is there a network?"


def _split(path: str) -> tuple[str, str]:
    bucket, _, name = path.removeprefix("gs://").partition("/")
    return bucket, name


def _blob(path: str) -> storage.Blob:
    bucket, name = _split(path)
    return _client().bucket(bucket).blob(name)


@functools.cache
def _client() -> storage.Client:
    try:
        return storage.Client(project=None)  # without this argument, it would search for a project
    except DefaultCredentialsError:  # an anonymous client reads public data
        return storage.Client.create_anonymous_client()


def _retry(seconds: float) -> Any:
    return DEFAULT_RETRY.with_timeout(seconds).with_delay(initial=0.3, maximum=8.0)


def _check_addresses() -> None:
    """Raises UserError for settings that would send credentials to a host that is neither Google's nor this one."""
    for name in ADDRESSES:
        value = os.environ.get(name)
        if value and not _trusted(value):
            raise UserError(f"{name}={value}: credentials would go there; it must be https://*.googleapis.com or a "
                            "loopback address such as http://127.0.0.1:4443")
    for protocol in ("gcs", "gs"):
        address = fsspec.config.conf.get(protocol, {}).get("endpoint_url")
        if address and not _trusted(address):
            raise UserError(f"endpoint_url={address} in the settings of fsspec (FSSPEC_{protocol.upper()}_ENDPOINT_URL "
                            "or a file in ~/.config/fsspec): credentials would go there; remove it")
    universe = os.environ.get("GOOGLE_CLOUD_UNIVERSE_DOMAIN") or "googleapis.com"
    if universe != "googleapis.com":
        raise UserError(f"GOOGLE_CLOUD_UNIVERSE_DOMAIN={universe}: credentials would go there; remove it")


def _trusted(address: str) -> bool:
    parts = urlsplit(address if "://" in address else f"http://{address}")
    host = parts.hostname or ""
    if host == "localhost" or host == "::1" or (host.startswith("127.") and host.replace(".", "").isdigit()):
        return parts.scheme in ("http", "https")
    return parts.scheme == "https" and host.endswith(".googleapis.com")


@functools.cache
def _prepare() -> None:
    """Sets timeouts of gcsfs and TensorStore, and silences logs whose content BucketError has."""
    for name in ("gcsfs", "fsspec", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Other processes and TensorStore write too, so gcsfs's cached listings may be outdated.
    settings = fsspec.config.conf.setdefault("gcs", {})
    settings |= {"use_listings_cache": False,
                 "session_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}}
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        settings["token"] = "anon"  # no search for credentials
    # Timeouts of a stalled request; TensorStore reads these variables when it first opens a bucket.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "10")
