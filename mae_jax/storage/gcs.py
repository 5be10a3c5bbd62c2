"""Objects on gs://: what is found out before a run begins, and small files, with deadlines of our own.

Checkpoints go through orbax, hence gcsfs and TensorStore, which try again for many minutes. The check at the start must
be told within seconds, and what the loop itself writes (metrics, pictures, its lease) must not hold it up: that goes
through google-cloud-storage, which verifies what it reads by the checksum that the bucket has.
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

CHECK_SECONDS = 8.0  # for the check at the start, all tries and the search for credentials together
RETRY_SECONDS = 60.0  # seconds in which something that must not fail is tried again
TIMEOUT = (4.0, 8.0)  # seconds of one request: to connect, and without a byte
ADDRESSES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "API_ENDPOINT_OVERRIDE")
ROLE = "roles/storage.objectAdmin"
FAILURES = (exceptions.GoogleAPIError, GoogleAuthError, requests.RequestException, DataCorruption, InvalidResponse)


class BucketError(OSError):
    """A bucket cannot be reached, read or written; the text is one line with the path and what to do."""


class GenerationMismatch(Exception):
    """An object is not of the generation that it was to be."""


class StoredObject(NamedTuple):
    """What an object holds, and its generation, a number that is another one after each write."""

    content: bytes
    generation: int


def check(path: str) -> None:
    """Finds out in seconds whether a bucket can be looked into; called before gs:// is used in any other way.

    Raises:
      UserError: it cannot, with the path and a hint; or credentials would be sent to a stranger.
    """
    _check_addresses()
    _prepare()
    name, inside = _split(path)
    # In a thread: looking for credentials and for addresses has no deadline.
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
    """Returns an object, None where it is not there; raises BucketError."""
    return _plainly(path, lambda: _download(_blob(path)))


def _download(blob: storage.Blob, tries: int = 2) -> StoredObject | None:
    try:
        return StoredObject(blob.download_as_bytes(timeout=TIMEOUT, retry=_retry(RETRY_SECONDS)), blob.generation)
    except (DataCorruption, requests.exceptions.ChunkedEncodingError):  # on its way here, most often
        if tries == 1:
            raise
        return _download(blob, tries - 1)
    except exceptions.NotFound as error:
        if "bucket does not exist" in str(error):
            raise
        return None


def names(folder: str, pattern: str = "") -> list[str]:
    """Returns the names of what is in a folder, those of folders with a '/' at their end; raises BucketError.

    Args:
      folder: gs://bucket/folder.
      pattern: of the paths under the folder of objects to return instead, as '*/done.txt'; `*` is within one name.
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
    """Writes an object, which appears as a whole or not at all; returns its generation.

    Args:
      path: gs://bucket/object.
      content: what it will hold.
      seconds: in which a failing bucket is tried again; one request more may come on top.
      generation: of the object that is to give way, 0 where none is to be there; None: whatever is there.

    Raises:
      BucketError: it was not written, as far as is known.
      GenerationMismatch: an object of another generation is there.
    """
    blob = _blob(path)
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    _plainly(path, lambda: blob.upload_from_string(
        content, kind, if_generation_match=generation, timeout=(4.0, max(8.0, seconds / 2)), retry=_retry(seconds)))
    return blob.generation


def delete(path: str, generation: int, seconds: float) -> None:
    """Deletes an object of that generation where it is there; raises BucketError, and GenerationMismatch."""
    def remove() -> None:
        with contextlib.suppress(exceptions.NotFound):
            _blob(path).delete(if_generation_match=generation, timeout=seconds, retry=None)

    _plainly(path, remove)


def _plainly(path: str, action: Callable[[], Any]) -> Any:
    """Returns what `action` does; raises one line where a bucket fails."""
    try:
        return action()
    except exceptions.PreconditionFailed as error:
        raise GenerationMismatch(str(error)) from None
    except exceptions.RetryError as error:
        raise BucketError(_told(path, error.cause or error)) from None
    except FAILURES as error:
        raise BucketError(_told(path, error)) from None


def _told(path: str, error: BaseException) -> str:
    bucket = f"gs://{_split(path)[0]}"
    said = " ".join(str(getattr(error, "message", None) or error).split())
    reason = re.search(r'"message": "(.*?)"', said)  # of an upload, amid the whole answer
    said = reason[1] if reason else re.sub(r"^[A-Z]+ https?://\S+: |^.*Caused by ", "", said)[:300]
    if isinstance(error, exceptions.NotFound):
        return f"{path}: there is no bucket {bucket}; look at its name, or: gcloud storage buckets create {bucket}"
    if isinstance(error, exceptions.Forbidden):
        return f"{path}: access denied ({said}); the account needs {ROLE} on {bucket}"
    if isinstance(error, exceptions.Unauthorized | GoogleAuthError):
        said = "none were found" if isinstance(error, InvalidOperation) else said
        return (f"{path}: no valid credentials ({said}); run: gcloud auth application-default login, or give the "
                f"machine's service account {ROLE} on {bucket}")
    if isinstance(error, DataCorruption):
        return f"{path}: what arrives is not what the bucket holds, twice; the checksums differ"
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
        return storage.Client(project=None)  # a project is for making buckets; else it would look for one
    except DefaultCredentialsError:  # will do for public data
        return storage.Client.create_anonymous_client()


def _retry(seconds: float) -> Any:
    return DEFAULT_RETRY.with_timeout(seconds).with_delay(initial=0.3, maximum=8.0)


def _check_addresses() -> None:
    """Refuses variables that would send credentials to a host that is neither Google's nor this one."""
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
    """Sets limits to what gcsfs and TensorStore wait for, and keeps them from printing what is told in our lines."""
    for name in ("gcsfs", "fsspec", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Other processes and TensorStore write too: what gcsfs remembers of a listing may be old.
    settings = fsspec.config.conf.setdefault("gcs", {})
    settings |= {"use_listings_cache": False,
                 "session_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}}
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        settings["token"] = "anon"  # looks for no credentials
    # A request without a byte for so long has failed; TensorStore reads these when it meets the first bucket.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "10")
