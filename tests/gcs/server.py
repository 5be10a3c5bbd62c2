"""A small server of Google Cloud Storage's JSON API in memory, with faults on demand; for tests, on loopback only.

  python -m tests.gcs.server --port=0      # prints its URL; ends with the process

Clients find it through STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL, see `environment`.

Served: buckets (made, looked at, storageLayout); objects listed (prefix, delimiter, matchGlob, startOffset,
endOffset, maxResults, pageToken), read (JSON, alt=media, /download, XML /BUCKET/OBJECT, ranges), written (media,
multipart, resumable), deleted, rewritten, copied, moved, composed; conditions on generations (412, 304);
x-goog-generation and x-goog-hash on all that is read.

Faults, from any process: POST /_faults with one JSON object, or a list of them, of these fields:

  method  regular expression of the whole method, by default any: 'POST|PUT'
  path    regular expression to be found in the path with its query, unquoted: 'upload.*/d/'; the query of an upload
          always has the object's name
  kind    'status': answers `status` and does nothing
          'reset': resets the connection and does nothing; 'lost': does it and then resets, so that the caller cannot
          know; 'slow': does it `seconds` later; 'flip': does it and flips a bit in the middle of the answer's body;
          'cut': does it and closes the connection after half of the answer's body
  status  503; any other
  seconds 1.0
  times   1: how many requests; -1: all from now on
  after   0: how many requests that match are spared first

A request takes the first fault that matches. GET /_faults returns the faults with `done`, how many requests each has
had; DELETE /_faults forgets them all. GET /_requests returns the requests so far as ['GET /storage/v1/b/...', ...].
"""

import argparse
import contextlib
import email
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.gcs.store import Query, Refused, Store

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


@dataclass
class Fault:
    """See the module's text."""

    path: str
    method: str = ".*"
    kind: str = "status"
    status: int = 503
    seconds: float = 1.0
    times: int = 1
    after: int = 0
    done: int = 0
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Says whether a request gets this fault, and counts it."""
        if self.done == self.times or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self.seen += 1
        if self.seen <= self.after:
            return False
        self.done += 1
        return True


@dataclass
class Session:
    """A resumable upload; `stored` is what the request that ended it was answered."""

    bucket: str
    name: str
    about: dict[str, Any]
    query: Query
    content: bytearray = field(default_factory=bytearray)
    stored: Answer | None = None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # else headers and body go out as two packets, 40 ms apart
    disable_nagle_algorithm = True
    server: "Server"

    def answer(self) -> None:
        """Handles one request: its fault, then what ROUTES says."""
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        path = parts.path
        self.body = self.read_body()
        fault = None
        if not path.startswith("/_"):
            fault = self.server.noted(self.command, self.shown(unquote(path), unquote(parts.query)))
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault and fault.kind == "reset":
            self.drop()
            return
        try:
            if fault and fault.kind == "status":
                raise Refused(fault.status, "a fault of the test")
            status, headers, body = self.route(path)
        except Refused as refused:
            text = {"error": {"code": refused.status, "message": refused.reason, "errors": []}}
            status, headers, body = refused.status, {}, b"" if refused.status == 304 else json.dumps(text).encode()
        if fault and fault.kind == "lost":
            self.drop()
            return
        self.send(status, headers, body, fault.kind if fault else "")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def shown(self, path: str, query: str) -> str:
        """Returns the path as faults see it."""
        if self.query.get("uploadType") == "multipart" and "name" not in self.query:
            query += f"&name={multipart(self.headers['Content-Type'], self.body)[0]['name']}"
        elif session := self.server.sessions.get(self.query.get("upload_id", "")):
            query += f"&name={session.name}"
        return f"{path}?{query}" if query else path

    def route(self, path: str) -> Answer:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return action(self, *(unquote(group) for group in match.groups()))
        raise Refused(404, f"this server has no {self.command} {path}")

    def send(self, status: int, headers: dict[str, str], body: bytes, fault: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(body))))
        self.end_headers()
        if fault == "flip" and body:
            at = len(body) // 2
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1:]
        if self.command != "HEAD":
            self.wfile.write(body[:len(body) // 2] if fault == "cut" else body)
        self.close_connection |= fault == "cut"

    def drop(self) -> None:
        """Ends the connection with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *args: Any) -> None:
        pass

    def faults(self) -> Answer:
        if self.command == "POST":
            wanted = json.loads(self.body)
            self.server.add(*(wanted if isinstance(wanted, list) else [wanted]))
        elif self.command == "DELETE":
            self.server.clear()
        return json_answer([asdict(fault) for fault in self.server.faults])

    def requests(self) -> Answer:
        return json_answer(self.server.requests)

    def make_bucket(self) -> Answer:
        name = json.loads(self.body)["name"]
        self.server.store.make(name)
        return self.look_at_bucket(name)

    def look_at_bucket(self, name: str) -> Answer:
        self.server.store.bucket(name)
        return json_answer({"kind": "storage#bucket", "id": name, "name": name, "location": "US", "metageneration": "1",
                            "storageClass": "STANDARD"})

    def layout(self, name: str) -> Answer:
        self.server.store.bucket(name)
        return json_answer({"kind": "storage#storageLayout", "bucket": name, "location": "US",
                            "locationType": "region", "hierarchicalNamespace": {"enabled": False}})

    def list(self, bucket: str) -> Answer:
        return json_answer(self.server.store.list(bucket, self.query))

    def read(self, bucket: str, name: str) -> Answer:
        found = self.server.store.get(bucket, name, self.query)
        if self.query.get("alt") != "media":
            return json_answer(found.described(bucket, name))
        return self.media(bucket, name)

    def media(self, bucket: str, name: str) -> Answer:
        """Returns the content of an object, or of a range of it."""
        found = self.server.store.get(bucket, name, self.query)
        size, (crc32c, md5) = len(found.content), found.hashes()
        headers = {"Content-Type": found.kind, "ETag": f'"{found.generation}"', "x-goog-metageneration": "1",
                   "x-goog-generation": str(found.generation), "x-goog-stored-content-length": str(size),
                   "x-goog-hash": f"crc32c={crc32c},md5={md5}", "Accept-Ranges": "bytes",
                   "Last-Modified": self.date_time_string(int(found.made))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted or wanted.group(0) == "bytes=-":
            return 200, headers, found.content
        first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        return 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}, found.content[first:last + 1]

    def delete(self, bucket: str, name: str) -> Answer:
        self.server.store.delete(bucket, name, self.query)
        return 204, {}, b""

    def upload(self, bucket: str) -> Answer:
        """Takes a whole object, or begins a resumable upload, or goes on with one."""
        kind, name = self.query.get("uploadType"), self.query.get("name", "")
        if "upload_id" in self.query:
            return self.resume(self.query["upload_id"])
        if kind == "media":
            return self.store(bucket, name, self.body, {"contentType": self.headers.get("Content-Type")})
        if kind == "multipart":
            about, content = multipart(self.headers["Content-Type"], self.body)
            return self.store(bucket, name or about["name"], content, about)
        self.server.store.bucket(bucket)
        about = json.loads(self.body or b"{}")
        about.setdefault("contentType", self.headers.get("X-Upload-Content-Type"))
        number = str(next(self.server.store.numbers))
        self.server.sessions[number] = Session(bucket, name or about["name"], about, self.query)
        scheme = "https" if getattr(self.connection, "context", None) else "http"
        place = f"{scheme}://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
        return 200, {"Location": f"{place}&upload_id={number}"}, b""

    def resume(self, number: str) -> Answer:
        """Takes a chunk of a resumable upload: 308 with what is there so far, until all is."""
        session = self.server.sessions.get(number)
        if session is None:
            raise Refused(410, "no such upload")
        if self.command == "DELETE":
            del self.server.sessions[number]
            return 499, {}, b""
        if session.stored:
            return session.stored
        chunk = re.fullmatch(r"bytes (?:\*|(\d+)-\d+)/(\*|\d+)", self.headers.get("Content-Range") or "bytes 0-0/0")
        if chunk[1] and int(chunk[1]) <= len(session.content):
            session.content[int(chunk[1]):] = self.body
        if chunk[2] == "*" or len(session.content) < int(chunk[2]):
            return 308, {"Range": f"bytes=0-{len(session.content) - 1}"} if session.content else {}, b""
        session.stored = self.store(session.bucket, session.name, bytes(session.content), session.about, session.query)
        return session.stored

    def store(self, bucket: str, name: str, content: bytes, about: dict[str, Any],
              query: Query | None = None) -> Answer:
        new = self.server.store.put(bucket, name, content, about, self.query if query is None else query)
        return json_answer(new.described(bucket, name))

    def copy(self, bucket: str, name: str, how: str, to: str, new_name: str) -> Answer:
        found = self.server.store.get(bucket, name, {})
        _, _, described = self.store(to, new_name, found.content, {"contentType": found.kind, "metadata": found.notes})
        if how == "copyTo":
            return json_answer(json.loads(described))
        size = str(len(found.content))
        return json_answer({"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size,
                            "objectSize": size, "resource": json.loads(described)})

    def move(self, bucket: str, name: str, new_name: str) -> Answer:
        with self.server.store.lock:
            found = self.server.store.get(bucket, name, {})
            self.server.store.delete(bucket, name, {})
            return self.store(bucket, new_name, found.content, {"contentType": found.kind, "metadata": found.notes})

    def compose(self, bucket: str, name: str) -> Answer:
        wanted = json.loads(self.body)
        parts = [self.server.store.get(bucket, part["name"], {}).content for part in wanted["sourceObjects"]]
        return self.store(bucket, name, b"".join(parts), wanted.get("destination") or {})


B, O = r"/storage/v1/b/([^/]+)", r"/o/([^/]+)"  # noqa: E741
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET|POST|DELETE", "/_faults", Handler.faults),
    ("GET", "/_requests", Handler.requests),
    ("POST", "/storage/v1/b", Handler.make_bucket),
    ("GET", B, Handler.look_at_bucket),
    ("GET", f"{B}/storageLayout", Handler.layout),
    ("GET", f"{B}/o", Handler.list),
    ("GET", B + O, Handler.read),
    ("DELETE", B + O, Handler.delete),
    ("GET", f"/download{B}{O}", Handler.media),
    ("POST|PUT|DELETE", f"/(?:resumable/)?upload{B}/o", Handler.upload),
    ("POST", f"{B}{O}/(rewriteTo|copyTo)/b/([^/]+){O}", Handler.copy),
    ("POST", f"{B}{O}/moveTo{O}", Handler.move),
    ("POST", f"{B}{O}/compose", Handler.compose),
    ("GET|HEAD", "/([^/]+)/(.+)", Handler.media),
]


def multipart(kind: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the description and the content of a multipart upload."""
    boundary = b"--" + email.message_from_string(f"Content-Type: {kind}").get_boundary().encode()
    end = b"\r\n" if body.startswith(boundary + b"\r") else b"\n"
    _, about, content = body.split(boundary + end, 2)
    head, content = content.rsplit(end + boundary + b"--", 1)[0].split(2 * end, 1)
    kind = email.message_from_bytes(head).get("Content-Type")
    return {"contentType": kind, **json.loads(about.split(2 * end, 1)[1])}, content


def json_answer(content: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


class Server(ThreadingHTTPServer):
    """The server; `url` is where it listens."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store, self.sessions = Store(), {}
        self.faults, self.requests = [], []
        self._noting = threading.Lock()

    def add(self, *faults: dict[str, Any]) -> None:
        """Adds faults, each the fields of `Fault`."""
        with self._noting:
            self.faults += [Fault(**fault) for fault in faults]

    def clear(self) -> None:
        with self._noting:
            self.faults, self.requests = [], []

    def noted(self, method: str, path: str) -> Fault | None:
        """Notes a request and returns its fault."""
        with self._noting:
            self.requests.append(f"{method} {path}")
            return next((fault for fault in self.faults if fault.takes(method, path)), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client was killed in the middle of a request


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[Server]:
    """Runs a server with these buckets in threads of this process."""
    server = Server()
    server.store.buckets |= {name: {} for name in buckets}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def environment(url: str) -> dict[str, str]:
    """Returns the variables with which all clients but TensorFlow's find the server, and need no credentials."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "fake",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true", "EPATH_USE_TF": "false"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append", default=[])
    arguments = parser.parse_args()
    server = Server(arguments.port)
    server.store.buckets |= {name: {} for name in arguments.bucket}
    print(server.url, flush=True)
    server.serve_forever()
