"""make-shards reads lists, tables and shards in addition to folders, and a kill costs nothing."""

import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import encode, picture

from helpers import ROOT
from vistok import cli
from vistok.data.shards import ShardWriter
from vistok.data.sources import ShardSource
from vistok.tools import make_shards


def run(*arguments):
    return cli.make_shards([str(argument) for argument in arguments])


def contents(folder, split="train", members=()):
    """Image bytes to (label, further members), of all shards of a split."""
    source = ShardSource(sorted(folder.glob(f"{split}-*.tar")), others=None)
    return {
        source.read(i)[1]: (source.label(i), {m: source.read_other(i, m) for m in members})
        for i in range(len(source))
    }


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def images():
    return [encode(picture(number, 20, 20 + number), "JPEG") for number in range(12)]


def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


# ---------------------------------------------------------------------- lists and folders


@pytest.mark.parametrize("separator", ["\t", " "])
def test_a_list_with_numbers(tmp_path, images, separator):
    (tmp_path / "sub dir").mkdir()
    lines = []
    for number, data in enumerate(images):
        (tmp_path / "sub dir" / f"{number}.jpg").write_bytes(data)
        place = tmp_path if number % 2 else "."  # absolute, or within the list's folder
        lines.append(f"{place}/sub dir/{number}.jpg{separator}{number * 3}")
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n")
    assert run(tmp_path / "list.txt", f"out={tmp_path / 'o'}", "workers=2") == 0
    found = contents(tmp_path / "o")
    assert {data: label for data, (label, _) in found.items()} == {
        data: number * 3 for number, data in enumerate(images)
    }


def test_a_list_with_names_or_none_and_a_missing_file(tmp_path, images, capsys):
    for number, data in enumerate(images):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    names = [f"{n}.jpg" for n in range(12)] + ["gone.jpg"]
    (tmp_path / "named.txt").write_text(
        "".join(f"{n} {'dog' if '1' in n else 'a cat'}\n" for n in names)
    )
    (tmp_path / "plain.txt").write_text("\n".join(names))
    assert run(tmp_path / "named.txt", f"out={tmp_path / 'o'}") == 0
    assert "gone.jpg: No such file" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert manifest["classes"] == ["a cat", "dog"] and manifest["left_out"] == ["gone.jpg"]
    found = contents(tmp_path / "o")
    assert [found[data][0] for data in images] == [int("1" in str(n)) for n in range(12)]
    assert run(tmp_path / "plain.txt", f"out={tmp_path / 'p'}") == 0
    assert {label for label, _ in contents(tmp_path / "p").values()} == {None}


def test_lists_that_cannot_be(tmp_path, capsys):
    for text, message in [
        ("a.jpg 1\nb.jpg\n", "only some lines have a label; the first without one is b.jpg"),
        ("a.jpg\na.jpg\n", "lists a.jpg more than once"),
        ("\n", "lists no images"),
        (b"\xff\xd8\xff\xfe", "not a text file"),
    ]:
        (tmp_path / "x.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert run(tmp_path / "x.txt", f"out={tmp_path / 'o'}") == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert not (tmp_path / "o").exists()


def test_files_beside_the_images_come_along(tmp_path, images):
    (tmp_path / "p").mkdir()
    for number, data in enumerate(images):
        (tmp_path / "p" / f"{number}.x.jpg").write_bytes(data)
        (tmp_path / "p" / f"{number}.x.txt").write_text(f"caption {number}")
        if number != 5:
            (tmp_path / "p" / f"{number}.x.npy").write_bytes(npy(np.full(300, number)))
    assert run(tmp_path / "p", f"out={tmp_path / 'o'}", "members=txt,npy", "shard_size=20KB") == 0
    tars = sorted((tmp_path / "o").glob("*.tar"))
    assert len(tars) > 2 and all(tar.stat().st_size <= 20_480 for tar in tars)
    found = contents(tmp_path / "o", members=("txt", "npy"))
    for number, data in enumerate(images):
        expected = None if number == 5 else npy(np.full(300, number))
        assert found[data][1] == {"txt": f"caption {number}".encode(), "npy": expected}
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert {tuple(s["members"]) for s in manifest["splits"]["train"]["shards"]} <= {("npy", "txt")}


# ---------------------------------------------------------------------- shards


def test_shards_are_dealt_anew_with_all_they_have(tmp_path, images):
    with ShardWriter(tmp_path / "old", "train") as writer:
        for number, data in enumerate(images):
            if number == 6:
                writer.roll()
            others = {"txt": f"caption {number}".encode(), "clip.npy": npy(np.arange(4) + number)}
            writer.write(data, "jpg", number, f"n01/{number}", others=others)
    for place in (tmp_path / "old", tmp_path / "old" / "train-{000000..000001}.tar"):
        out = tmp_path / f"o{len(str(place))}"
        assert run(place, f"out={out}", "val_fraction=0.3") == 0
        found = {}
        for split in ("train", "val"):
            found |= contents(out, split, ("txt", "clip.npy"))
        assert len(found) == 12
        for number, data in enumerate(images):
            label, others = found[data]
            assert label == number and others["txt"] == f"caption {number}".encode()
            assert others["clip.npy"] == npy(np.arange(4) + number)
    assert run(tmp_path / "old", f"out={tmp_path / 'few'}", "members=txt") == 0
    assert ShardSource(sorted((tmp_path / "few").glob("*.tar"))).others == ["txt"]


# ---------------------------------------------------------------------- tables


@pytest.fixture
def pa():
    return pytest.importorskip("pyarrow")


HUGGING_FACE = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


def table(pa, images, nested=True):
    column = [
        {"bytes": data, "path": f"{i}.jpg"} if nested else data for i, data in enumerate(images)
    ]
    found = pa.table(
        {
            "image": column,
            "label": [number % 2 for number in range(len(images))],
            "text": [f"caption {number}" for number in range(len(images))],
            "url": ["x"] * len(images),
        }
    )
    return found.replace_schema_metadata({"huggingface": json.dumps(HUGGING_FACE)})


def write_table(pa, kind, folder, whole):
    folder.mkdir()
    halves = [whole.slice(0, 7), whole.slice(7)]
    if kind == "parquet":
        import pyarrow.parquet as parquet

        for number, half in enumerate(halves):
            parquet.write_table(half, folder / f"train-{number}.parquet", row_group_size=3)
        return
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, half in zip(names, halves, strict=True):
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, whole.schema) as out,
        ):
            out.write_table(half)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("nested", [True, False])
def test_tables(pa, tmp_path, images, kind, nested, capsys):
    rows = [*images, images[0][:50], None]  # the last two: damaged, and without an image
    if nested:
        rows[-1] = b""
    write_table(pa, kind, tmp_path / "t", table(pa, rows, nested))
    assert run(tmp_path / "t", f"out={tmp_path / 'o'}", "shard_size=20KB", "workers=2") == 0
    found = contents(tmp_path / "o", members=("txt",))
    assert len(found) == 12
    for number, data in enumerate(images):
        assert found[data] == (number % 2, {"txt": f"caption {number}".encode()})
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert manifest["classes"] == ["cat", "dog"]
    assert [name.partition("/")[2] for name in manifest["left_out"]] == ["000000005", "000000006"]
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert all(
        name.endswith((".tar", ".idx", ".json", "names.tsv")) for name in names
    )  # nothing left behind
    # The same as from a folder, but for order: no image is encoded anew.
    assert run(tmp_path / "t", f"out={tmp_path / 'again'}", "shard_size=20KB") == 0
    assert tree(tmp_path / "again") == tree(tmp_path / "o")


def test_tables_that_cannot_be(pa, tmp_path, images, capsys):
    write_table(pa, "parquet", tmp_path / "t", table(pa, images))
    for arguments, message in [
        (["image=img"], "image=img: "),
        (["image=url"], "column url holds str, not the bytes of image files"),
        (["label=lable"], "label=lable: "),
    ]:
        assert run(tmp_path / "t", f"out={tmp_path / 'o'}", *arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
        assert not any((tmp_path / "o").iterdir())
    (tmp_path / "t" / "train-1.parquet").write_bytes(b"hello")
    assert run(tmp_path / "t", f"out={tmp_path / 'o'}") == 2
    assert "train-1.parquet: cannot be read" in capsys.readouterr().err
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert run(tmp_path / "d", f"out={tmp_path / 'o'}") == 2
    assert f"name one: {tmp_path}/d/train" in capsys.readouterr().err


def test_without_pyarrow(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(tmp_path / "x.parquet", f"out={tmp_path / 'o'}") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


# ---------------------------------------------------------------------- kills


#: make-shards, killed at the n-th time that one of its processes touches a file of a folder. The
#: kill is of the main process alone: its workers must notice.
MORTAL = """
import multiprocessing, os, signal, sys
from vistok.tools import make_shards

folder, number, *arguments = sys.argv[1:]
main, left = os.getpid(), multiprocessing.Value("q", int(number))

def count(event, details):
    if event in ("open", "os.rename", "os.remove") and str(details[0]).startswith(folder):
        with left.get_lock():
            left.value -= 1
            now = left.value == 0
        if now:
            os.kill(main, signal.SIGKILL)

sys.addaudithook(count)
sys.exit(make_shards.TOOL(arguments))
"""


@pytest.mark.slow
def test_killed_anywhere_and_continued(tmp_path):
    source, out = tmp_path / "p", tmp_path / "o"
    source.mkdir()
    noise = np.random.default_rng(0)
    for number in range(100):
        image = noise.integers(0, 256, (30, 30, 3), dtype=np.uint8)
        (source / f"{number:02d}.png").write_bytes(encode(image))
    (source / "bad.png").write_bytes(b"hello")
    options = [source, "shard_size=20KB", "workers=2", "val_fraction=0.2"]
    assert run(*options, f"out={tmp_path / 'whole'}") == 0
    moments, seen = random.Random(1), set()
    for _ in range(12):
        # Even a run that finds all shards finished touches more than 250 files.
        command = [sys.executable, "-c", MORTAL, tmp_path, moments.randint(1, 250), *options]
        process = subprocess.run(
            [*map(str, command), f"out={out}"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tokenizers")},
            stdout=subprocess.DEVNULL,
        )
        assert process.returncode == -signal.SIGKILL
        with open(out / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the workers left over have ended
        seen.add(len(list(out.glob("*.tar"))))
    assert len(seen) >= 4, seen  # at different places
    assert run(*options, f"out={out}") == 0
    assert tree(out) == tree(tmp_path / "whole")
    source = ShardSource(sorted(out.glob("*.tar")))
    assert len({source.read(i)[1] for i in range(len(source))}) == len(source) == 100


def test_two_at_once_are_refused(tmp_path, photos, capsys, monkeypatch):
    out = tmp_path / "o"
    out.mkdir()
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(make_shards.time, "monotonic", lambda: next(clock))
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(photos, f"out={out}") == 2
    assert "another make-shards is writing to it" in capsys.readouterr().err
    assert os.listdir(out) == [".lock"]
