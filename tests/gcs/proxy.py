"""Lets TensorFlow's own client, which knows Google's addresses alone, reach the test server: a proxy that ends TLS.

The client asks the proxy on loopback for a tunnel to storage.googleapis.com, finds the server at its end, and trusts
the certificate that `environment` names.
"""

import contextlib
import datetime
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.gcs.server import Handler, Server

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


class Tunnel(BaseHTTPRequestHandler):
    """One connection to the proxy."""

    server: "Proxy"

    def do_CONNECT(self) -> None:
        """Ends TLS here and lets the test server answer."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError), self.server.context.wrap_socket(self.connection, server_side=True) as line:
            Handler(line, self.client_address, self.server.behind)

    def log_message(self, *args: object) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    """The proxy, in front of a test server."""

    daemon_threads = True

    def __init__(self, behind: Server, certificate: Path):
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.behind = behind
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)


def make_certificate(file: Path) -> None:
    """Writes a key and a certificate that it signed itself for Google's hosts, for a day."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test server")])
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256()))
    plain = serialization.NoEncryption()
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
                     + certificate.public_bytes(serialization.Encoding.PEM))


@contextlib.contextmanager
def in_front_of(server: Server, folder: Path) -> Iterator[dict[str, str]]:
    """Runs a proxy in threads of this process; yields the variables with which TensorFlow goes through it."""
    certificate = folder / "certificate.pem"
    make_certificate(certificate)
    proxy = Proxy(server, certificate)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield {"https_proxy": f"http://127.0.0.1:{proxy.server_port}", "no_proxy": "127.0.0.1",
               "CURL_CA_BUNDLE": str(certificate)}
    finally:
        proxy.shutdown()
        proxy.server_close()
