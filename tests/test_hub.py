"""The Hub, by a stand-in of it on this machine: pull with revision and cache, push, and bad names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vistok
from helpers import images_of
from hub_stand_in import TOKEN, Repository, serving
from token_helpers import small_export
from vistok.core.errors import CheckpointError, ConfigError
from vistok.export.hub import push

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).resolve().parents[1]
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """me/tok with two revisions; the client reads its settings when it is imported, so they are
    set in its modules."""
    import huggingface_hub._snapshot_download as snapshots
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download
    import huggingface_hub.hf_api as hf_api

    old = small_export(tmp_path / "old")
    new = small_export(tmp_path / "new", quantizer=("quantizer=vq", "quantizer.codebook_size=12"))
    (new / "code.py").write_text("raise SystemExit('this ran')")
    repository = Repository()
    for branch, folder in (("main", new), ("v1", old)):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        repository.commit(files, branch, COMMITS[branch])
    with serving({"me/tok": repository}) as (found, address):
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
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield found


def test_load_by_name_with_revision_and_cache(hub, tmp_path):
    images = images_of(2)
    for revision, folder in ((None, "new"), ("v1", "old")):
        found = vistok.load("me/tok", revision=revision)
        assert torch.equal(found.tokenize(images), vistok.load(tmp_path / folder).tokenize(images))
    assert not [path for path in hub.asked if "code.py" in path]
    hub.stop()
    found = vistok.load("me/tok", revision=COMMITS["v1"])  # from the cache
    assert torch.equal(found.tokenize(images), vistok.load(tmp_path / "old").tokenize(images))


def test_what_is_not_there_is_one_line(hub, tmp_path):
    for name, revision in (("me/nothing", None), ("me/tok", "v9")):
        with pytest.raises(CheckpointError, match=f"^{name}.*Hub") as caught:
            vistok.load(name, revision=revision)
        assert "\n" not in str(caught.value)


def test_an_altered_download_is_refused(hub):
    files = hub.repositories["me/tok"].commits[COMMITS["main"]]
    data = bytearray(files["model.safetensors"])
    data[-1] ^= 1
    files["model.safetensors"] = bytes(data)
    with pytest.raises(CheckpointError, match="altered"):
        vistok.load("me/tok")


def test_a_mistyped_path_is_not_looked_for_on_the_hub(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="no such run, export or checkpoint"):
        vistok.load("runs/mien")
    assert hub.asked == []


def test_what_is_pushed_is_what_loads(hub, tmp_path):
    """Through the Hub's own client: weights by their SHA-256, the rest within the commit."""
    folder = small_export(tmp_path / "export")
    (folder / "notes.txt").write_text("not of the export")
    images = images_of(2)
    expected = vistok.load(folder).tokenize(images)

    address = push(folder, "me/fresh")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".txt"}
    repository = hub.repositories["me/fresh"]
    first = repository.names["main"]
    assert address.endswith(f"/me/fresh/commit/{first}")
    assert repository.commits[first] == {".gitattributes": b"*.safetensors filter=lfs\n", **files}
    weights = {data for name, data in files.items() if name.endswith(".safetensors")}
    assert set(hub.store.values()) == weights and len(weights) == 2
    kinds = {line["value"]["path"]: line["key"] for line in hub.commits[0][1:]}
    assert kinds == {n: "lfsFile" if n.endswith(".safetensors") else "file" for n in files}
    assert torch.equal(vistok.load("me/fresh").tokenize(images), expected)

    assert push(folder, "me/fresh") == address  # nothing changed: no commit
    assert len(hub.commits) == 1
    other = tmp_path / "new"
    push(other, "me/fresh")
    assert len(hub.commits) == 2
    ids = vistok.load(other).tokenize(images)
    assert torch.equal(vistok.load("me/fresh").tokenize(images), ids)
    assert torch.equal(vistok.load("me/fresh", revision=first).tokenize(images), expected)


def test_a_push_that_is_refused_is_one_line(hub, tmp_path, monkeypatch):
    folder = small_export(tmp_path / "export")

    def refused(name, error, *words):
        with pytest.raises(error) as caught:
            push(folder, name)
        told = str(caught.value)
        assert "\n" not in told and all(word in told for word in (f"push={name}", *words)), told

    refused("tok", ConfigError, "owner/name")
    refused("others/tok", CheckpointError, "403", "rights")
    monkeypatch.setattr(hub, "do_PUT", lambda self: self.body() and self.answer(403, b"{}"))
    refused("me/fresh", CheckpointError, "could not be uploaded", ".safetensors")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused("me/fresh", CheckpointError, "401")
    assert hub.commits == []
    hub.stop()
    refused("me/fresh", CheckpointError, "could not be uploaded")
    asked = len(hub.asked)
    (folder / "vocabulary.json").write_text("{}")
    with pytest.raises(CheckpointError, match="altered"):
        push(folder, "me/fresh")
    assert len(hub.asked) == asked


@pytest.mark.slow
def test_the_command_pushes_and_a_fresh_process_loads(finished_run, tmp_path):
    """As a user types it, with the client's environment variables alone."""
    load = """
import sys
import vistok
from helpers import images_of
print(vistok.load(sys.argv[1]).tokenize(images_of(1)).tolist())
"""
    with serving({}) as (hub, address):
        place = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}  # fmt: skip
        paths = os.pathsep.join([str(ROOT / "tokenizers"), str(ROOT / "tests")])
        environment = {**os.environ, **place, "PYTHONPATH": paths}

        def python(*words):
            done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        folder = tmp_path / "exported"
        told = python("-m", "vistok", "export", f"run={finished_run}", f"out={folder}", "push=me/mine")  # fmt: skip
        commit = hub.repositories["me/mine"].names["main"]
        assert f"{address}/me/mine/commit/{commit}" in told
        assert python("-c", load, "me/mine") == python("-c", load, str(folder))
        assert list((tmp_path / "home" / "hub").glob(f"models--me--mine/snapshots/{commit}/model.safetensors"))  # fmt: skip
