"""Uploading an export: huggingface_hub's own client against a small server that speaks the calls it makes."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest

from nuteprune.__main__ import main
from nuteprune.config import ExportConfig, load_config
from nuteprune.errors import UserError
from nuteprune.evaluation.compare import checked
from nuteprune.exporting.publish import push
from nuteprune.runs.checkpoint import write_manifest


class Hub(BaseHTTPRequestHandler):
    """Makes repositories and takes commits of small files; `seen` keeps what came."""

    seen = None

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")
            }
            self.seen.update(files=files, commit=self.path)
            answer = {"commitUrl": f"{self.server.address}/me/small/commit/abc", "commitOid": "abc", "success": True}
        elif "/preupload/" in self.path:
            wanted = [f["path"] for f in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]}
        elif self.path == "/api/repos/create":
            self.seen.update(created=json.loads(body))
            answer = {"url": f"{self.server.address}/me/small"}
        else:  # the check of the card's head
            answer = {"errors": [], "warnings": []}
        self.reply(answer)

    def do_GET(self):
        self.reply({"id": "me/small", "sha": "0", "siblings": []})

    def reply(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def export_dir(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
    (folder / "config.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_an_export_is_uploaded_whole_to_a_private_repository(export_dir, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    seen = {}
    monkeypatch.setattr(Hub, "seen", seen)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        address = push(export_dir, ExportConfig(push_to_hub="me/small"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert address.endswith("/me/small")
    assert "private" in (seen["created"].get("visibility"), *seen["created"])  # huggingface_hub 2 and before
    assert seen["created"]["name"] == "small"
    assert seen["commit"].endswith("/api/models/me/small/commit/main")
    assert seen["files"] == {p.name: p.read_bytes() for p in export_dir.iterdir() if p.name != "manifest.json"}


def test_what_cannot_be_pushed_is_one_line(export_dir):
    with pytest.raises(UserError, match=r"export.push_to_hub me/small: ") as caught:  # tests are offline
        push(export_dir, ExportConfig(push_to_hub="me/small"))
    assert "\n" not in str(caught.value)
    (export_dir / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"config\.json has 3 bytes instead of 2: export again"):
        push(export_dir, ExportConfig(push_to_hub="me/small"))


def test_what_is_no_name_of_a_repository_is_refused_before_anything_is_written(run_dir, capsys):
    before = sorted(run_dir.rglob("*"))
    assert main(["export", str(run_dir), "--push-to-hub", "me/small/model"]) == 2
    assert "nuteprune: export.push_to_hub me/small/model: Repo id must be" in capsys.readouterr().err
    assert sorted(run_dir.rglob("*")) == before
    with pytest.raises(UserError, match=r"export.push_to_hub me/small/model: Repo id must be"):
        checked(load_config(run_dir, ["export.push_to_hub=me/small/model"]), [])
