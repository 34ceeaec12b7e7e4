"""A small Hugging Face Hub on this machine: what its client needs to create, fill and download a private model."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_token_of_a_test"


class Hub(ThreadingHTTPServer):
    """The models are in ``models``: name to path to content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        """The id of the newest commit."""
        return hashlib.sha1(repr(sorted(self.models[name].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        files = self.server.models.get(name)
        if files is None or (self.server.private[name] and not self._is_authorised()):
            self._reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("api/models/") and "/tree/" in path:
            self._reply([self._entry(file, content) for file, content in files.items()])
        elif path.startswith("api/models/"):
            commit = self.server.commit(name)
            self._reply({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        elif (file := path.split("/", 4)[-1]) in files:
            etag = hashlib.sha1(files[file]).hexdigest()
            self._reply(files[file], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.commit(name)})
        else:
            self._reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._is_authorised():
            self._reply({"error": "Invalid username or password."}, 401)
            return
        name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.models.setdefault(name, {})
            self.server.private[name] = asked["visibility"] == "private"
            self._reply({"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._reply({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                change = json.loads(line)
                if change["key"] == "file":
                    self.server.models[name][change["value"]["path"]] = base64.b64decode(change["value"]["content"])
                elif change["key"] == "deletedFile":
                    del self.server.models[name][change["value"]["path"]]
            commit = self.server.commit(name)
            self._reply({"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self._reply({"error": f"{self.path} is not part of the stand-in"}, 501)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _is_authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _entry(self, file: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a Hub without models."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
