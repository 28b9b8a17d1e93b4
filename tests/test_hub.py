"""The Hub, by a stand-in of it on this machine: pull with revision and cache, push, and bad names."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch

import vistok
from helpers import images_of
from token_helpers import small_export
from vistok.core.errors import CheckpointError, ConfigError

pytest.importorskip("huggingface_hub")

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Two revisions of one repository; `served` maps a commit to its files by name."""

    served: ClassVar[dict] = {}
    asked: ClassVar[list] = []

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "me", "tok"]:
            revision = parts[5] if len(parts) > 5 else "main"
            commit = COMMITS.get(revision, revision)
            if commit not in self.served:
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            if parts[4:5] == ["tree"]:
                found = self.served[commit].items()
                tree = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in found
                ]
                return self.answer(200, json.dumps(tree).encode(), {}, body)
            files = [{"rfilename": name} for name in self.served[commit]]
            content = {"id": "me/tok", "sha": commit, "siblings": files, "private": False}
            return self.answer(200, json.dumps(content).encode(), {}, body)
        if parts[:3] == ["me", "tok", "resolve"]:
            commit = COMMITS.get(parts[3], parts[3])
            data = self.served[commit]["/".join(parts[4:])]
            etag = hashlib.sha256(data).hexdigest()
            return self.answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, body)
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def answer(self, code, data, headers, body):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub._snapshot_download as snapshots
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download
    import huggingface_hub.hf_api as hf_api

    old = small_export(tmp_path / "old")
    new = small_export(tmp_path / "new", quantizer=("quantizer=vq", "quantizer.codebook_size=12"))
    (new / "code.py").write_text("raise SystemExit('this ran')")
    Hub.served = {
        commit: {path.name: path.read_bytes() for path in folder.iterdir()}
        for commit, folder in ((COMMITS["main"], new), (COMMITS["v1"], old))
    }
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for module in (constants, hf_api, file_download, snapshots):
        for name in ("ENDPOINT", "HF_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, address if name == "ENDPOINT" else str(tmp_path / "cache")
                )
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def test_load_by_name_with_revision_and_cache(hub, tmp_path):
    images = images_of(2)
    for revision, folder in ((None, "new"), ("v1", "old")):
        found = vistok.load("me/tok", revision=revision)
        assert torch.equal(found.tokenize(images), vistok.load(tmp_path / folder).tokenize(images))
    assert not [path for path in Hub.asked if "code.py" in path]
    hub.shutdown()
    hub.server_close()
    found = vistok.load("me/tok", revision=COMMITS["v1"])  # from the cache
    assert torch.equal(found.tokenize(images), vistok.load(tmp_path / "old").tokenize(images))


def test_what_is_not_there_is_one_line(hub, tmp_path):
    for name, revision in (("me/nothing", None), ("me/tok", "v9")):
        with pytest.raises(CheckpointError, match=f"^{name}.*Hub") as caught:
            vistok.load(name, revision=revision)
        assert "\n" not in str(caught.value)


def test_an_altered_download_is_refused(hub):
    files = Hub.served[COMMITS["main"]]
    data = bytearray(files["model.safetensors"])
    data[-1] ^= 1
    files["model.safetensors"] = bytes(data)
    with pytest.raises(CheckpointError, match="altered"):
        vistok.load("me/tok")


def test_a_mistyped_path_is_not_looked_for_on_the_hub(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="no such run, export or checkpoint"):
        vistok.load("runs/mien")
    assert Hub.asked == []


def test_push_uploads_the_files_of_an_export(tmp_path, monkeypatch):
    """The calls to the Hub's own client, which does the rest."""
    import huggingface_hub

    from vistok.export.hub import push

    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))

        def upload_folder(self, **words):
            calls.append(("upload", words))
            return "https://huggingface.co/me/tok/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = small_export(tmp_path / "export")
    assert push(folder, "me/tok") == "https://huggingface.co/me/tok/commit/1"
    assert calls[0] == ("create", "me/tok", True)
    assert calls[1][1]["folder_path"] == folder and calls[1][1]["repo_id"] == "me/tok"
    with pytest.raises(ConfigError, match="owner/name"):
        push(folder, "tok")
    (folder / "vocabulary.json").write_text("{}")
    with pytest.raises(CheckpointError, match="altered"):
        push(folder, "me/tok")
    assert len(calls) == 2
