"""Shards from a local HTTP server that stalls, cuts, fails and lies; and through fsspec."""

import json
import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from data_helpers import encode, picture

from helpers import PATIENCE
from vistok.core.errors import DataError
from vistok.data import remote
from vistok.data.datamodule import VistokDataModule
from vistok.data.index import sidecar
from vistok.data.places import expand_shards
from vistok.data.remote import RemoteShard, ShardCache
from vistok.data.shards import ShardWriter, write_manifest


class Server:
    """Serves a folder; `faults` says per path what goes wrong, request by request."""

    def __init__(self, folder):
        self.folder, self.faults, self.asked, self.ranges = folder, {}, Counter(), True
        self.stalled, self.released = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                outer.asked[name] += 1
                faults = outer.faults.get(name, [])
                fault = faults.pop(0) if faults else "none"
                if fault == "stall":
                    outer.stalled.set()
                path = outer.folder / name
                if isinstance(fault, int):
                    return self.send_error(fault)
                if not path.exists():
                    return self.send_error(404)
                data, start = path.read_bytes(), 0
                if (wanted := self.headers.get("Range")) and outer.ranges:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                data = data[start:]
                if fault == "none":
                    self.wfile.write(data)
                elif fault == "lie":
                    self.wfile.write(b"x" * len(data))
                else:
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        outer.released.wait(PATIENCE)
                return None

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(remote, "_manifests", {})
    server = Server(shards)
    yield server
    server.close()


@pytest.fixture
def quick(tmp_path):
    return ShardCache(tmp_path / "kept", retries=3, timeout=PATIENCE, pause=0.01)


NAME = "train-000001.tar"


@pytest.fixture
def impatient(server, monkeypatch):
    """Waits for a request that stalls 0.3 s, and for all others as long as they take."""
    http = remote._http

    def impatiently(url, start, timeout):
        if server.faults.get(url.rpartition("/")[2], [])[:1] != ["stall"]:
            yield from http(url, start, timeout)
            return
        server.stalled.clear()
        try:
            yield from http(url, start, 0.3)
        except OSError:
            assert server.stalled.wait(PATIENCE)  # a slow server hears it before the next one
            raise

    monkeypatch.setattr(remote, "_http", impatiently)


def content(shard):
    descriptor = shard.open()
    try:
        return os.pread(descriptor, 10**8, 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["cut"],
        ["cut", "cut", "cut"],
        ["stall"],
        [500],
        [503, "cut", 429],
        ["lie"],
        ["cut", "lie"],
    ],
    ids=str,
)
@pytest.mark.usefixtures("impatient")
def test_what_passes_is_tried_again_and_nothing_is_lost(server, quick, shards, faults, ranges):
    server.faults[NAME], server.ranges = list(faults), ranges
    shard = RemoteShard(f"{server.url}/{NAME}", quick)
    assert content(shard) == (shards / NAME).read_bytes()
    assert server.asked[NAME] == 1 + len(faults)
    assert content(shard) == (shards / NAME).read_bytes()
    assert server.asked[NAME] == 1 + len(faults)  # the second time from the cache
    assert [p.name for p in quick.folder.iterdir() if "part" in p.name] == []


@pytest.mark.parametrize(
    ("faults", "message", "asked"),
    [
        (["stall"] * 9, rf"no data for {PATIENCE} s \(gave up after 4 tries\)", 4),
        ([500] * 9, r"HTTP 500 \(Internal Server Error\) \(gave up after 4 tries\)", 4),
        (["lie"] * 9, r"does not match the checksum in its manifest \(gave up after 4 tries\)", 4),
        ([403], r"HTTP 403 \(Forbidden\)$", 1),
        ([404], r"there is no such shard \(any more\)$", 1),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_what_does_not_pass_is_one_line(server, quick, shards, faults, message, asked):
    server.faults[NAME] = list(faults)
    shard = RemoteShard(f"{server.url}/{NAME}", quick)
    with pytest.raises(DataError, match=message) as error:
        shard.open()
    assert str(error.value).startswith(f"{server.url}/{NAME}: ") and "\n" not in str(error.value)
    assert server.asked[NAME] == asked
    server.faults[NAME] = []
    assert content(shard) == (shards / NAME).read_bytes()  # once it can be reached again


def test_cuts_go_on_at_the_byte_reached(server, quick, shards, monkeypatch):
    sent = []
    original = remote._http
    monkeypatch.setattr(
        remote,
        "_http",
        lambda url, start, timeout: sent.append(start) or original(url, start, timeout),
    )
    server.faults[NAME] = ["cut", "cut"]
    assert content(RemoteShard(f"{server.url}/{NAME}", quick)) == (shards / NAME).read_bytes()
    size = (shards / NAME).stat().st_size
    assert sent[-3:] == [0, size // 2, size // 2 + (size - size // 2) // 2]


def test_nobody_there(quick):
    with pytest.raises(DataError, match=r"^http://127.0.0.1:9/manifest.json: .*refused.*4 tries"):
        RemoteShard("http://127.0.0.1:9/x.tar", quick).open()


def module(server, **options):
    options = {
        "image_size": 16,
        "batch_size": 8,
        "num_workers": 0,
        "retries": 2,
        "timeout": PATIENCE,
        **options,
    }
    train = f"{server.url}/train-{{000000..000002}}.tar"
    datamodule = VistokDataModule("shards", train, val_fraction=0.1, **options)
    datamodule.setup()
    return datamodule


def rows(datamodule, count):
    found = []
    for batch in datamodule.train_dataloader():
        found += zip(
            batch["key"], (image.numpy().tobytes() for image in batch["image"]), strict=True
        )
        datamodule.advance()
        if len(found) >= count * 8:
            return found
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_local_shards(server, shards, workers):
    local = VistokDataModule("shards", f"{shards}/*.tar", val_fraction=0.1, image_size=16, batch_size=8, num_workers=0)  # fmt: skip
    local.setup()
    far = module(server, num_workers=workers)
    assert sum(server.asked[f"train-00000{i}.tar"] for i in range(3)) == 0  # indexes suffice
    assert far.fingerprint == local.fingerprint
    assert rows(far, 10) == rows(local, 10)
    assert all(server.asked[f"train-00000{i}.tar"] == 1 for i in range(3))  # not once per worker


def test_a_run_whose_server_fails_continues_where_it_was(server, shards, cache):
    whole = rows(module(server), 10)
    for path in (cache / "shards").glob("*.tar"):
        path.unlink()
    first = module(server, shuffle_buffer=4, retries=0)
    expected = rows(module(server, shuffle_buffer=4), 10)
    for path in (cache / "shards").glob("*.tar"):
        path.unlink()
    server.faults = {f"train-00000{i}.tar": [500] * 5 for i in (1, 2)}
    found = []
    with pytest.raises(DataError, match=r"train-00000\d.tar: HTTP 500"):
        for batch in first.train_dataloader():
            found += zip(batch["key"], (i.numpy().tobytes() for i in batch["image"]), strict=True)
            first.advance()
    server.faults = {}
    second = module(server, shuffle_buffer=4)
    second.load_state_dict(first.state_dict())
    assert found + rows(second, 10 - len(found) // 8) == expected
    assert len(whole) == 80


def test_shards_without_index_or_manifest_are_indexed_once(server, shards):
    (shards / "manifest.json").unlink()
    for path in shards.glob("*.idx"):
        path.unlink()
    server.faults["train-000000.tar"] = ["cut"]
    assert module(server).num_train > 25
    asked = dict(server.asked)
    assert asked["train-000000.tar"] == 2
    again = module(server)
    assert {n: c for n, c in server.asked.items() if n.endswith(".tar")} == {n: c for n, c in asked.items() if n.endswith(".tar")}  # fmt: skip
    assert len(rows(again, 3)) == 24


def test_a_set_written_anew_at_the_same_address(server, shards, quick, monkeypatch):
    shard = RemoteShard(f"{server.url}/{NAME}", quick)
    old = content(shard)
    with ShardWriter(shards, "train") as writer:
        for number in range(3):
            writer.write(encode(picture(number)), "png")
            writer.roll()
    write_manifest(shards, {"train": writer.shards})
    monkeypatch.setattr(remote, "_manifests", {})
    shard = RemoteShard(f"{server.url}/{NAME}", quick)
    assert content(shard) == (shards / NAME).read_bytes() != old
    assert len(shard.index()) == 1


def test_a_shard_that_does_not_fit_its_index(server, shards, quick):
    (shards / "manifest.json").unlink()
    shard = RemoteShard(f"{server.url}/{NAME}", quick)
    shard.index()
    (shards / NAME).write_bytes((shards / NAME).read_bytes() + b"\0" * 512)
    with pytest.raises(DataError, match=r"has \d+ bytes; its index says \d+"):
        shard.open()


def test_the_cache_is_bounded_by_what_was_used_longest_ago(server, shards, tmp_path):
    sizes = [(shards / f"train-00000{i}.tar").stat().st_size for i in range(3)]
    cache = ShardCache(tmp_path / "kept", max_bytes=sizes[0] + sizes[2] + 10, retries=0)
    places = [RemoteShard(f"{server.url}/train-00000{i}.tar", cache) for i in range(3)]
    opened = []
    for number in (0, 1, 0, 2):
        time.sleep(0.02)
        opened.append(places[number].open())
    kept = {path.name[21:] for path in cache.folder.glob("*.tar")}
    assert kept == {"train-000000.tar", "train-000002.tar"}
    for number, descriptor in zip((0, 1, 0, 2), opened, strict=True):
        data = (shards / f"train-00000{number}.tar").read_bytes()
        assert os.pread(descriptor, 10**8, 0) == data  # also the one removed meanwhile
        os.close(descriptor)
    tiny = ShardCache(tmp_path / "tiny", max_bytes=1)
    assert content(RemoteShard(places[0].url, tiny)) == (shards / "train-000000.tar").read_bytes()


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir"):
        RemoteShard(f"{server.url}/{NAME}", ShardCache(tmp_path / "file")).open()


def test_equal_names_in_two_folders(server, shards, quick):
    (shards / "val").mkdir()
    with ShardWriter(shards / "val", "train") as writer:
        writer.write(encode(picture(7)), "png")
    one, other = (RemoteShard(f"{server.url}/{f}train-000000.tar", quick) for f in ("", "val/"))
    assert content(one) != content(other) == (shards / "val" / "train-000000.tar").read_bytes()


def test_a_local_shard_removed_in_mid_run(shards):
    datamodule = VistokDataModule("shards", f"{shards}/*.tar", image_size=16, num_workers=0)
    datamodule.setup()
    for tar in shards.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=r"train-00000\d.tar has disappeared since the run began"):
        next(iter(datamodule.train_dataloader()))


# ---------------------------------------------------------------------- fsspec


def test_through_fsspec(shards, quick):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    found = expand_shards("memory://bucket/train-{000000..000001}.tar", cache=quick)
    assert [str(shard) for shard in found] == [
        f"memory://bucket/train-00000{i}.tar" for i in (0, 1)
    ]
    assert all(isinstance(shard, RemoteShard) for shard in found)
    assert content(found[1]) == (shards / NAME).read_bytes()
    assert len(found[0].index()) == 15
    gone = RemoteShard("memory://bucket/train-000009.tar", quick)
    with pytest.raises(
        DataError, match=r"memory://bucket/train-000009.tar: there is no such shard"
    ):
        gone.open()
    assert json.loads(memory.cat_file("/bucket/manifest.json"))
    assert sidecar(shards / NAME).exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [("s3://bucket/x.tar", "s3fs"), ("gs://bucket/x.tar", "gcsfs"), ("xyz://x.tar", "xyz")],
)
def test_missing_packages_are_named(quick, url, message, monkeypatch):
    import sys

    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=message) as error:
        RemoteShard(url, quick).open()
    assert "\n" not in str(error.value)


def test_remote_shards_are_checked(server, shards, tmp_path, monkeypatch, capsys):
    from vistok import cli

    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.0)

    def check(place):
        monkeypatch.setattr(remote, "_manifests", {})
        code = cli.check_shards([f"{server.url}/{place}".rstrip("/"), "decode=true", "workers=1"])
        return code, capsys.readouterr().out

    for place in ("", "train-{000000..000002}.tar", NAME):
        code, said = check(place)
        assert code == 0 and "no problems found" in said, said
    data = bytearray((shards / NAME).read_bytes())
    data[700] ^= 1
    (shards / NAME).write_bytes(data)
    for kept in (tmp_path / "kept").rglob("*.tar"):
        kept.unlink()
    code, said = check("")
    assert code == 1 and f"{NAME}: does not match the checksum in its manifest" in said
    (shards / NAME).unlink()
    code, said = check("train-{000000..000002}.tar")
    assert code == 1 and f"{NAME}: there is no such shard" in said
    (shards / "manifest.json").unlink()
    monkeypatch.setattr(remote, "_manifests", {})
    assert cli.check_shards([server.url]) == 2
    assert "no manifest.json of vistok here" in capsys.readouterr().err
