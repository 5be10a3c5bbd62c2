"""What the test server holds: buckets of objects with generations, and the conditions that requests put on them."""

import base64
import hashlib
import itertools
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import google_crc32c

PAGE = 1000  # names of a list, at most
Query = dict[str, str]


class Refused(Exception):
    """What the server answers instead: a status and a reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass
class Stored:
    """An object."""

    content: bytes
    generation: int
    kind: str
    notes: dict[str, str]
    made: float = field(default_factory=time.time)

    def hashes(self) -> tuple[str, str]:
        """Returns crc32c and md5 as the API writes them."""
        digests = google_crc32c.Checksum(self.content).digest(), hashlib.md5(self.content).digest()
        return base64.b64encode(digests[0]).decode(), base64.b64encode(digests[1]).decode()

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        """Returns the resource of the JSON API."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.made)) + f".{int(self.made % 1 * 1000):03d}Z"
        crc32c, md5 = self.hashes()
        return {"kind": "storage#object", "id": f"{bucket}/{name}/{self.generation}", "name": name, "bucket": bucket,
                "generation": str(self.generation), "metageneration": "1", "contentType": self.kind,
                "size": str(len(self.content)), "md5Hash": md5, "crc32c": crc32c, "etag": str(self.generation),
                "timeCreated": stamp, "updated": stamp, "storageClass": "STANDARD", "metadata": self.notes}


class Store:
    """Buckets of objects. Every method is atomic; `query` holds a request's conditions on generations."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.numbers = itertools.count(time.time_ns() // 1000)  # generations, which only grow

    def make(self, name: str) -> None:
        with self.lock:
            if name in self.buckets:
                raise Refused(409, "You already own this bucket.")
            self.buckets[name] = {}

    def bucket(self, name: str) -> dict[str, Stored]:
        if name not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def get(self, bucket: str, name: str, query: Query) -> Stored:
        """Returns an object; 304 where it is the known one, 412 where it is not the one asked for."""
        with self.lock:
            found = self.bucket(bucket).get(name)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise Refused(304, "Not Modified")
        _check(found, query)
        return found

    def put(self, bucket: str, name: str, content: bytes, about: dict[str, Any], query: Query) -> Stored:
        """Writes an object whose `about` may say contentType and metadata."""
        with self.lock:
            objects = self.bucket(bucket)
            _check(objects.get(name), query)
            kind = about.get("contentType") or "application/octet-stream"
            objects[name] = Stored(content, next(self.numbers), kind, about.get("metadata") or {})
            return objects[name]

    def delete(self, bucket: str, name: str, query: Query) -> None:
        with self.lock:
            self.get(bucket, name, query)
            del self.buckets[bucket][name]

    def list(self, bucket: str, query: Query) -> dict[str, Any]:
        """Returns a page of objects and, with a delimiter, of the prefixes up to it."""
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        entries: dict[str, Stored | None] = {}  # name → object, prefix → None; in order, as the names are
        with self.lock:
            names = sorted(self.bucket(bucket).items())
        for name, stored in names:
            if not _fits(name, query.get("matchGlob", "")):
                continue
            if name.startswith(query.get("prefix", "")) and name >= start and (not end or name < end):
                shown = _shown(name, query)
                entries[shown] = stored if shown == name else None
        after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        left = [(shown, stored) for shown, stored in entries.items() if shown > after]
        page = left[:min(int(query.get("maxResults", PAGE)), PAGE)]
        more = {"nextPageToken": base64.urlsafe_b64encode(page[-1][0].encode()).decode()} if page != left else {}
        return {"kind": "storage#objects", "prefixes": [shown for shown, stored in page if stored is None],
                "items": [stored.described(bucket, shown) for shown, stored in page if stored is not None], **more}


def _fits(name: str, pattern: str) -> bool:
    """Says whether a name fits a pattern, of which only `*`, what is within a part of the path, is known here."""
    assert not set(pattern) & set("?[]{}\\"), pattern
    assert "**" not in pattern, pattern
    return not pattern or re.fullmatch("[^/]*".join(map(re.escape, pattern.split("*"))), name) is not None


def _shown(name: str, query: Query) -> str:
    """Returns the name, or its part up to the delimiter after the prefix."""
    delimiter = query.get("delimiter", "")
    at = name.find(delimiter, len(query.get("prefix", ""))) if delimiter else -1
    return name if at < 0 else name[:at + len(delimiter)]


def _check(found: Stored | None, query: Query) -> None:
    """Raises 412 where the conditions of a request do not hold; generation 0 is that of an object that is not there."""
    here = str(found.generation) if found else "0"
    if query.get("ifGenerationMatch", here) != here or query.get("ifGenerationNotMatch") == here:
        raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
