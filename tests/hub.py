"""A small hub on this machine: the directory of one model, served to huggingface_hub's own client."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self) -> None:
        hub, (path, _, _) = self.server, self.path.partition("?")
        if path == "/":
            return self._send(200, b"", {})
        if path.startswith(f"/api/models/{hub.name}"):
            files = [(file.name, file.stat().st_size) for file in sorted(hub.folder.iterdir()) if file.is_file()]
            facts: list | dict = {"id": hub.name, "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in files]}
            if "/tree/" in path:
                facts = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in files]
            return self._send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
        file = hub.folder / path.rpartition("/")[2]
        if not (path.startswith(f"/{hub.name}/resolve/") and file.is_file()):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        if self.command == "GET":
            hub.sent.append(file.name)
        tag = f'"{sha256(body).hexdigest()}"'
        headers = {"ETag": tag, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(body))}
        return self._send(200, body, headers, hub.delay if file.suffix == ".safetensors" else 0.0)

    def _send(self, status: int, body: bytes, headers: dict, delay: float = 0.0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), -(-len(body) // 10)) if self.command == "GET" and body else ():
            self.wfile.write(body[start : start + -(-len(body) // 10)])
            time.sleep(delay / 10)  # in pieces: a client waits for the next one only so long


@contextmanager
def small_hub(folder: Path, name: str = "me/tiny", delay: float = 0.0) -> Iterator[ThreadingHTTPServer]:
    """A server whose `address` is an HF_ENDPOINT; `sent` are the files that were fetched, weights within `delay` s."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.folder, server.name, server.delay, server.sent = folder, name, delay, []
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
