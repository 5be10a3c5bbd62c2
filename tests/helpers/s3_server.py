"""A server that answers as S3 does to who lists and reads: ListObjectsV2, HeadObject, GetObject with ranges."""

import datetime
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
PAGE = 3  # objects in an answer


class Server(ThreadingHTTPServer):
    """The buckets: name → object → content; those in `forbidden` nobody may look into."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.forbidden: set[str] = set()
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Lists a bucket, or gives an object or a part of it."""
        parts = urlsplit(self.path)
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        self.server.requests.append(self.path)
        objects = self.server.buckets.get(bucket)
        if bucket in self.server.forbidden:
            return self._error(403, "AccessDenied", "Access Denied")
        if objects is None:
            return self._error(404, "NoSuchBucket", "The specified bucket does not exist")
        if not name:
            return self._list(objects, {key: value[0] for key, value in parse_qs(parts.query).items()})
        if name not in objects:
            return self._error(404, "NoSuchKey", "The specified key does not exist.")
        content, headers, status = objects[name], {}, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
            headers = {"Content-Range": f"bytes {start}-{stop}/{len(content)}"}
            content, status = content[start:stop + 1], 206
        return self._answer(status, content, {**headers, "ETag": f'"{hashlib.md5(objects[name]).hexdigest()}"'})

    do_HEAD = do_GET

    def _list(self, objects: dict[str, bytes], query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, str] = {}
        for name in sorted(name for name in objects if name.startswith(prefix)):
            rest = name[len(prefix):]
            if delimiter and delimiter in rest:
                folder = prefix + rest.split(delimiter)[0] + delimiter
                entries[folder] = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            else:
                entries[name] = (f"<Contents><Key>{escape(name)}</Key><Size>{len(objects[name])}</Size>"
                                 f"<LastModified>{WHEN:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
                                 f"<ETag>x</ETag><StorageClass>STANDARD</StorageClass></Contents>")
        after = unquote(query.get("continuation-token", ""))
        left = [name for name in entries if name > after]
        shown = left[:min(PAGE, int(query.get("max-keys", PAGE)))]
        more = len(left) > len(shown)
        token = f"<NextContinuationToken>{quote(shown[-1])}</NextContinuationToken>" if more and shown else ""
        listed = "".join(entries[name] for name in shown)
        body = (f"<?xml version='1.0'?><ListBucketResult><KeyCount>{len(shown)}</KeyCount><IsTruncated>"
                f"{str(more).lower()}</IsTruncated>{token}{listed}</ListBucketResult>")
        self._answer(200, body.encode(), {"Content-Type": "application/xml"})

    def _error(self, status: int, code: str, text: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
        self._answer(status, body, {"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Last-Modified": f"{WHEN:%a, %d %b %Y %H:%M:%S GMT}",
                            **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
