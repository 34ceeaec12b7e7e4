"""A place that machines share, as an object store."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from umbrella.file_storage import FileStorage


class Store(BaseHTTPRequestHandler):
    """As much of S3 as an upload needs."""

    taken: Callable[[int], None]
    """Called with the bytes of each part, before it is answered."""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        kind = "InitiateMultipartUploadResult" if self.path.endswith("uploads") else "CompleteMultipartUploadResult"
        self.answer(f"<{kind}><UploadId>1</UploadId><ETag>1</ETag></{kind}>".encode())

    def do_PUT(self) -> None:
        taken = len(self.rfile.read(int(self.headers["Content-Length"] or 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                taken += len(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        if "partNumber" in self.path:
            type(self).taken(taken)
        self.answer()

    def answer(self, content: bytes = b"") -> None:
        self.send_response(200)
        for name, value in {"ETag": '"1"', "Content-Length": str(len(content)), "Content-Type": "text/xml"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *unused: object) -> None:
        pass


def test_an_upload_to_s3_is_told_of_as_it_goes_on_and_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    (tmp_path / "weights").write_bytes(bytes(2**26))
    told, taken, ahead = [], [], []

    def take(size: int) -> None:
        taken.append(size)
        ahead.append(sum(told) - sum(taken))

    monkeypatch.setattr(Store, "taken", take, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        store = FileStorage(f"s3://bucket/runs?region=x&scheme=http&endpoint_override={address}")
        store.put("weights", tmp_path / "weights", told.append)
        server.shutdown()
    assert sum(told) == 2**26 <= sum(taken), "parts have checksums, too"
    assert len(taken) > 3
    assert max(ahead) <= 0, "no more is told of than has arrived"
