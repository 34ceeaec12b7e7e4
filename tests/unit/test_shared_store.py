"""A place that machines share, as an object store that answers slowly."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from umbrella.shared_store import SharedStore


class Slow(BaseHTTPRequestHandler):
    """As much of S3 as an upload needs; it takes no part until it may."""

    may_take = threading.Event()
    asked = threading.Event()
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        kind = "InitiateMultipartUploadResult" if self.path.endswith("uploads") else "CompleteMultipartUploadResult"
        self.answer(f"<{kind}><UploadId>1</UploadId><ETag>1</ETag></{kind}>".encode())

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"] or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        self.rfile.read(size)
        if "partNumber" in self.path:
            self.asked.set()
            self.may_take.wait(20)
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
    told: list[int] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = SharedStore(
            f"s3://bucket/runs?region=x&scheme=http&endpoint_override=127.0.0.1:{server.server_address[1]}"
        )
        upload = threading.Thread(target=store.put, args=("weights", tmp_path / "weights", told.append), daemon=True)
        upload.start()
        assert Slow.asked.wait(20)
        time.sleep(0.5)
        before = sum(told)
        Slow.may_take.set()
        upload.join(20)
        server.shutdown()
    assert before < 2**25
    assert sum(told) == 2**26
