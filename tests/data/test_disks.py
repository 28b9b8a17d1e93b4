"""Foreign tars, stale indexes, file names of any bytes, paths of any kind."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encode, picture

from vistok import cli
from vistok.core.errors import ConfigError, DataError
from vistok.core.files import cache_dir
from vistok.data.arrays import array_of, arrays_of
from vistok.data.datamodule import VistokDataModule
from vistok.data.folders import FolderSource
from vistok.data.held_out import hold_out
from vistok.data.index import ShardIndex, index_of, scan, sidecar
from vistok.data.manifest import entries
from vistok.data.names import shown
from vistok.data.places import absolute, expand_shards
from vistok.data.shards import ShardFile, ShardWriter
from vistok.data.sources import ShardSource


def image(number=0, kind="PNG"):
    return encode(picture(number, 12, 14), kind)


def tar_of(path, members, **options):
    """A tar of (name, bytes) or `TarInfo`s."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def used(path):
    source = ShardSource([path], others=None)
    return [source.read(i) for i in range(len(source))]


# ---------------------------------------------------------------------- foreign tars


def test_dots_in_names(tmp_path):
    names = [
        "a.jpg",
        "b 2.0.jpg",
        "2021.05.01.jpg",
        "2021.05.02.jpg",
        "v1.0/s.1.jpg",
        "v1.0/s.2.jpg",
    ]
    members = [(name, image(n)) for n, name in enumerate(names)]
    members += [("2021.05.02.cls", b"4"), ("b 2.0.cls", b"3"), ("v1.0/s.cls", b"5\n")]
    found = used(tar_of(tmp_path / "x.tar", members))
    assert [key for key, _, _ in found] == [name[:-4] for name in names]
    assert [data for _, data, _ in found] == [image(n) for n in range(6)]
    assert [label for _, _, label in found] == [None, 3, None, 4, 5, 5]


@pytest.mark.parametrize("order", ["before", "after", "backwards"])
def test_labels_wherever_they_stand(tmp_path, order):
    images = [(f"{n}.jpg", image(n)) for n in range(5)]
    labels = [(f"{n}.cls", b"%d" % (n + 7)) for n in range(5)]
    members = {
        "before": labels + images,
        "after": images + labels,
        "backwards": images + labels[::-1],
    }[order]
    found = used(tar_of(tmp_path / "x.tar", members))
    assert [(key, label) for key, _, label in found] == [(f"{n}", n + 7) for n in range(5)]


def test_links_are_followed_and_lost_ones_named(tmp_path):
    members = [
        link("first.jpg", "d/a.jpg"),  # to a later member
        ("d/a.jpg", image(1)),
        link("d/b.jpg", "a.jpg"),
        link("d/c.jpg", "d/a.jpg", tarfile.LNKTYPE),
        link("d/again.jpg", "b.jpg"),
        link("gone.jpg", "/etc/hosts"),
        link("up.jpg", "../../x.jpg"),
        link("circle.jpg", "circle.jpg"),
        link("text.txt", "nowhere"),
    ]
    path = tar_of(tmp_path / "x.tar", members)
    assert [key for key, _, _ in used(path)] == ["first", "d/a", "d/b", "d/c", "d/again"]
    assert {data for _, data, _ in used(path)} == {image(1)}
    left = dict(ShardSource([path]).left_out)
    assert set(left) == {"x.tar: gone.jpg", "x.tar: up.jpg", "x.tar: circle.jpg"}
    assert left["x.tar: gone.jpg"] == "is a link to /etc/hosts, not in the tar"


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize("form", ["oldgnu", "posix"])
def test_sparse_files_are_named_and_what_follows_is_used(tmp_path, form):
    """Of more holes than a header has room for, as GNU tar writes them."""
    with open(tmp_path / "hole.png", "wb") as file:
        for number in range(8):
            file.seek(number * 300_000)
            file.write(b"x" * 5000)
        file.truncate(3_000_000)
    (tmp_path / "b.png").write_bytes(image(1))
    command = ["tar", "-S", f"--format={form}", "-C", tmp_path, "-cf", tmp_path / "x.tar"]
    made = subprocess.run([*command, "hole.png", "b.png"], capture_output=True)
    if made.returncode or (tmp_path / "x.tar").stat().st_size > 1_000_000:
        pytest.skip("this tar or file system has no holes")
    source = ShardSource([tmp_path / "x.tar"])
    assert [bytes(k) for k in source.keys] == [b"b"]
    assert dict(source.left_out) == {"x.tar: hole.png": "is a sparse file"}


def test_what_is_left_out_is_named(tmp_path, capsys, caplog):
    pipe = tarfile.TarInfo("pipe.jpg")
    pipe.type = tarfile.FIFOTYPE
    members = [
        ("a.jpg", image(0)), ("a.png", image(1)), ("a.seg.png", image(2)),
        ("._a.jpg", b"x"), pipe, ("b.cls", b"1"), ("c.jpg", image(3)), ("c.cls", b"cat"),
        ("noext", image(4)), ("d.dat1", image(5)), ("readme", b"hello"), ("e.JPEG", image(6)),
    ]  # fmt: skip
    path = tar_of(tmp_path / "x.tar", members)
    source = ShardSource([path])
    assert [bytes(k) for k in source.keys] == [b"a", b"c", b"noext", b"d", b"e"]
    assert source.further_images == {"png": 1, "seg.png": 1}
    assert dict(source.left_out) == {
        "x.tar: ._a.jpg": "has a name that begins with a dot",
        "x.tar: pipe.jpg": "is not a regular file",
        "x.tar: b.cls": "is a label without an image",
        "x.tar: c.cls": "is a label but not a number: 'cat'",
    }
    assert cli.check_shards([str(path), "decode=true"]) == 0
    said = capsys.readouterr().out
    assert "x.tar: left out: b.cls is a label without an image" in said
    assert "1 image .seg.png: a further member of samples" in said
    assert "5 images (4 left out)" in said and "no problems found" in said
    VistokDataModule("shards", str(path), image_size=8, num_workers=0).setup("fit")
    assert "left out 4 members: x.tar: " in caplog.text and "1 .seg.png" in caplog.text


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_any_bytes(tmp_path, kind):
    names = ["d" * 90 + "/" + "e" * 90 + ".jpg", "caf\udce9.jpg", "line\nend.jpg", "ü.jpg"]
    members = [(name, image(n)) for n, name in enumerate(names)]
    path = tar_of(tmp_path / "x.tar", members, format=kind, errors="surrogateescape")
    source = ShardSource([path])
    assert [source.read(i)[1] for i in range(4)] == [image(n) for n in range(4)]
    assert [bytes(key) for key in source.keys] == [os.fsencode(name)[:-4] for name in names]
    for number in range(4):
        source.read(number)[0].encode()


def test_tars_one_after_the_other(tmp_path):
    first = tar_of(tmp_path / "a.tar", [("a.jpg", image(0))]).read_bytes()
    second = tar_of(tmp_path / "b.tar", [("b.jpg", image(1))]).read_bytes()
    (tmp_path / "x.tar").write_bytes(first + second)
    assert [key for key, _, _ in used(tmp_path / "x.tar")] == ["a", "b"]
    (tmp_path / "y.tar").write_bytes(first + b"hello" * 400)
    ((_, reason),) = ShardSource([tmp_path / "y.tar"]).left_out
    assert "after the end mark are not a tar" in reason


def header(name=b"a.jpg", kind=b"0", size=b"%011o\0" % 5):
    block = bytearray(512)
    block[: len(name)], block[156:157], block[124 : 124 + len(size)] = name, kind, size
    block[100:108], block[257:265], block[148:156] = b"0000644\0", b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(size=b"\x80" + b"\0" * 3 + b"\x7f" * 8), "is cut short"),
        (header(size=b"\xff" * 12), "a member of -1 bytes at byte 0"),
        (header(kind=b"x", size=b"\x80" + b"\0" * 6 + b"\x7f" * 5), "bytes of names or PAX records"),
        (header(kind=b"L", size=b"\x80" + b"\0" * 6 + b"\x7f" * 5), "bytes of names or PAX records"),
        (header(kind=b"x") + b"9 a=b".ljust(512, b"\0"), "PAX records that make no sense"),
        (header(kind=b"x", size=b"%011o\0" % 12) + b"12 size=-10\n".ljust(512, b"\0") + header(), "size="),
    ],
)  # fmt: skip
def test_absurd_headers(tmp_path, data, message):
    (tmp_path / "x.tar").write_bytes(data + b"\0" * 10240)
    with pytest.raises(DataError, match=message) as error:
        scan(tmp_path / "x.tar")
    assert str(tmp_path / "x.tar") in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------- indexes


def rewrite(path, change):
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    status = path.stat()
    tar_of(path, change(members), format=tarfile.USTAR_FORMAT)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # and no one can tell by its time


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda members: [(n, b"9" if n.endswith("cls") else d) for n, d in members],
        lambda members: members[::-1],
        lambda members: [(n.replace("1", "7"), d) for n, d in members],
    ],
)
def test_a_tar_rewritten_at_its_size_and_time(tmp_path, change, foreign):
    path = tmp_path / "x.tar"
    with ShardFile(path) as shard:
        for number in range(4):
            shard.add(str(number), image(number), "png", label=number)
    if foreign:
        sidecar(path).unlink()
    index_of(path), index_of(path)
    rewrite(path, change)
    found, truth = index_of(path), scan(path)
    for name in ("keys", "offsets", "sizes", "labels"):
        assert np.array_equal(getattr(found, name), getattr(truth, name)), name


def old_form(path):
    """An index as it was written before indexes had proofs."""
    with np.load(path) as arrays:
        later = ("checksum", "names", "left_out", "reasons", "proof", "proof_ranges")
        kept = {name: arrays[name] for name in arrays.files if name not in later}
    with open(path, "wb") as file:
        np.savez(file, **{**kept, "format": np.asarray(2)})


def test_an_index_without_proof_is_made_again_and_keeps_the_sizes(tmp_path, monkeypatch):
    path = tmp_path / "x.tar"
    with ShardFile(path, "plan") as shard:
        for number in range(4):
            shard.add(str(number), image(number), "png", label=number, size=(12, 14))
    new = index_of(path)
    old_form(sidecar(path))
    found = index_of(path)
    for name in ("keys", "offsets", "sizes", "labels", "heights", "widths", "plan"):
        assert np.array_equal(getattr(found, name), getattr(new, name)), name
    monkeypatch.setattr("vistok.data.index.scan", lambda tar: pytest.fail("scanned again"))
    assert np.array_equal(index_of(path).heights, new.heights)


def test_a_proof_is_asked_for_once(tmp_path, cache, monkeypatch):
    path = tmp_path / "x.tar"
    with ShardFile(path) as shard:
        shard.add("a", image(), "png")
    index_of(path)
    (seal,) = (cache / "index").glob("*.seal")
    later = seal.stat().st_mtime_ns + 10**10
    os.utime(seal, ns=(later, later))  # noted well after the tar was written
    monkeypatch.setattr(ShardIndex, "belongs_to", lambda *_: pytest.fail("asked again"))
    index_of(path)
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["offsets", "keys", "labels", "other_offsets", "proof_ranges"])
def test_an_index_that_says_what_cannot_be(tmp_path, name):
    path = tmp_path / "x.tar"
    with ShardFile(path) as shard:
        for number in range(3):
            shard.add(str(number), image(number), "png", label=number, others={"txt": b"a"})
    index = ShardIndex.load(sidecar(path))
    absurd = {"keys": np.zeros(2, "S4"), "labels": np.full(3, -9)}
    wrong = absurd[name] if name in absurd else getattr(index, name) + 2**60
    replace(index, **{name: wrong}).save(sidecar(path))
    assert ShardIndex.load(sidecar(path)) is None
    index.save(sidecar(path))
    with np.load(sidecar(path)) as arrays:  # and one row of it that could be
        found = dict(arrays)
    found["other_offsets"] = found["other_offsets"] + 1
    with open(sidecar(path), "wb") as file:
        np.savez(file, **found)
    assert ShardIndex.load(sidecar(path)) is None
    assert index_of(path).offsets.tolist() == scan(path).offsets.tolist()


def test_a_shard_written_anew_under_a_run(tmp_path):
    with ShardWriter(tmp_path / "s") as writer:
        for number in range(6):
            writer.write(image(number), "png", label=number)
    path = tmp_path / "s" / "train-000000.tar"
    source = ShardSource([path])
    source.read(0)
    os.utime(path, ns=(5, 5))  # touched: the same samples
    assert source.read(1)[1] == image(1)
    rewrite(path, lambda members: members[::-1])
    os.utime(path, ns=(7, 7))
    with pytest.raises(DataError, match=r"was written anew while it was being read") as error:
        source.read(2)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- folders, names, packing


def test_every_file_of_a_folder_is_an_image_or_named(tmp_path):
    root = tmp_path / "p"
    (root / "sub").mkdir(parents=True)
    for name in ("a.jfif", "B.JPG", "ab12cd", "c.xyz", "sub/d.png"):
        (root / name).write_bytes(image())
    (root / "notes.txt").write_bytes(image())
    (root / "readme").write_text("hello")
    (root / "gone.jpg").symlink_to("/nowhere.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "e.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    (Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png"))).write_bytes(image())
    source = FolderSource(root)
    keys = [bytes(key) for key in source.keys]
    assert keys == [
        b"B.JPG",
        b"a.jfif",
        b"ab12cd",
        b"c.xyz",
        b"caf\xe9.png",
        b"e.heic",
        b"sub/d.png",
    ]
    assert [name for name, _ in source.left_out] == ["gone.jpg", "loop.jpg", "pipe.jpg"]
    assert source.read(4)[0] == "caf\\xe9.png"


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "p" / "closed").mkdir(parents=True)
    (tmp_path / "p" / "a.png").write_bytes(image())
    real = os.scandir

    def scandir(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr("vistok.data.folders.os.scandir", scandir)
    source = FolderSource(tmp_path / "p")
    assert source.left_out == [("closed/", "cannot be read: Permission denied")]


def test_packing_keeps_names_of_any_bytes(tmp_path, capsys):
    root = tmp_path / "p"
    root.mkdir()
    names = [b"beach 1.png", b"caf\xe9.png", b"tab\there.png", b"back\\slash.png"]
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(image(number))
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xe9.jpg")).write_bytes(b"no image")
    out = tmp_path / "o"
    for _ in range(2):
        assert cli.make_shards([str(root), f"out={out}", "workers=1"]) == 0
    assert "bad\\xe9.jpg: not an image" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["left_out"] == ["bad\\xe9.jpg"]
    source = ShardSource([out / "train-000000.tar"])
    assert {source.original(i): source.read(i)[1] for i in range(4)} == {
        name: image(number) for number, name in enumerate(names)
    }
    rows = [line.split("\t") for line in (out / "names.tsv").read_text().splitlines()[1:]]
    assert {row[2].encode().decode("unicode_escape").encode("latin-1") for row in rows} == set(
        names
    )
    assert [row[1] for row in rows] == [key.decode() for key in source.keys.tolist()]
    again = tmp_path / "again"  # and when they are packed once more
    assert cli.make_shards([str(out), f"out={again}", "workers=1"]) == 0
    source = ShardSource([again / "train-000000.tar"])
    assert {source.original(i) for i in range(4)} == set(names)


def test_names_on_one_line():
    assert shown(b"caf\xe9 \xc3\xa9\n") == "caf\\xe9 é\\n"
    assert shown("a\udce9\u200b") == "a\\xe9\\u200b"


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("labels", "numbers", "kept"),
    [
        (["dog", "cat", None, "dog"], [1, 0, None, 1], None),
        (["10", "2", "2", None], [10, 2, 2, None], None),
        ([0.0, 1.0, float("nan"), 3.0], [0, 1, None, 3], None),
        ([0.5, 1.0, None, 2.0], [None] * 4, [b"0.5", b"1.0", None, b"2.0"]),
        ([[1], [2, 3], [], None], [None] * 4, [b"[1]", b"[2, 3]", b"[]", None]),
        ([3, -1, None, 0], [3, None, None, 0], None),
    ],
)
@pytest.mark.parametrize("choice", [[], ["label=null"]])
def test_labels_of_tables(tmp_path, labels, numbers, kept, choice):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    images = [image(n) for n in range(4)]
    parquet.write_table(pa.table({"image": images, "label": labels}), tmp_path / "t.parquet")
    out = tmp_path / "o"
    assert cli.make_shards([str(tmp_path / "t.parquet"), f"out={out}", "workers=1", *choice]) == 0
    source = ShardSource([out / "train-000000.tar"], others=None)
    found = {
        source.read(i)[1]: (source.label(i), source.read_other(i, "label.json")) for i in range(4)
    }
    none = [None] * 4
    expected = zip(none, none, strict=True) if choice else zip(numbers, kept or none, strict=True)
    assert [found[data] for data in images] == list(expected)
    if labels[0] == "dog" and not choice:
        assert json.loads((out / "manifest.json").read_text())["classes"] == ["cat", "dog"]


def test_tables_name_files_of_their_folder_only(tmp_path):
    from vistok.data.inputs import _file_next_to

    (tmp_path / "t").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "t" / "a.jpg").write_bytes(b"mine")
    table = tmp_path / "t" / "x.parquet"
    assert _file_next_to(table, "a.jpg") == b"mine"
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "gone.jpg", "a\0b"):
        assert _file_next_to(table, name) is None


# ---------------------------------------------------------------------- places


def test_names_that_look_like_patterns(tmp_path):
    for name in ("v[1]/a*.tar", "v[1]/b{1}.tar", "c,d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tar_of(tmp_path / name, [("a.jpg", image())])
        assert expand_shards(f"{tmp_path}/{name}") == [tmp_path / name]
    tar_of(tmp_path / "v[1]" / "b1.tar", [("a.jpg", image())])
    assert len(expand_shards(f"{tmp_path}/v[1]/*.tar")) == 3
    assert expand_shards(f"{tmp_path}/v[1]/b{{1..1}}.tar") == [tmp_path / "v[1]" / "b1.tar"]
    with pytest.raises(ConfigError, match=r"the braces name 10\d+ shards"):
        expand_shards(f"{tmp_path}/x-{{0..9999999}}-{{0..9999999}}.tar")


def test_data_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    found = absolute(
        {
            "train": ["a/x-{0..3}.tar", "https://host/x.tar", "~/y.tar"],
            "val": 2020,
            "cache_dir": None,
            "sources": {"p": {"train": "photos", "weight": 2}},
        }
    )
    assert found["train"] == [
        f"{tmp_path}/a/x-{{0..3}}.tar",
        "https://host/x.tar",
        "/home/me/y.tar",
    ]
    assert found["val"] == f"{tmp_path}/2020" and found["cache_dir"] is None
    assert found["sources"] == {"p": {"train": f"{tmp_path}/photos", "weight": 2}}


@pytest.mark.parametrize("name", ["a,b", "2020", "[1]", "null", "1e3"])
def test_folders_called_like_values(tmp_path, monkeypatch, name):
    from vistok.core.configuration import compose
    from vistok.core.words import quoted

    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    words = [quoted(f"data.train={name}"), "data=folder"]
    assert str(compose("train", words).data.train) == name
    assert quoted("data.train=c,d") == "data.train=c,d"  # a choice of a sweep, unless it is there


def test_no_home(monkeypatch, photos):
    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VISTOK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_dir().name == f"vistok-cache-{os.getuid()}"
    VistokDataModule("folder", str(photos), num_workers=0)


# ---------------------------------------------------------------------- shares, arrays, manifests


class Keys:
    name = "x"

    def __init__(self, keys):
        self.keys = np.array(keys)

    def __len__(self):
        return len(self.keys)


@pytest.mark.parametrize("keys", [[b"image"] * 4000, [b"%d" % (n % 10) for n in range(4000)]])
def test_a_share_is_a_share_for_any_keys(keys):
    for fraction in (0.02, 0.3):
        chosen = hold_out(Keys(keys), fraction)
        deviation = (4000 * fraction * (1 - fraction)) ** 0.5
        assert abs(chosen.sum() - 4000 * fraction) < 5 * deviation
        more = hold_out(Keys([*keys, b"new", keys[0]]), fraction)
        assert np.array_equal(more[:4000], chosen)


def test_a_run_from_before_resumes_on_keys_that_come_again(tmp_path):
    for number in range(2):
        tar_of(tmp_path / f"{number}.tar", [(f"{n}.png", image(n)) for n in range(30)])

    def module():
        data = VistokDataModule(
            "shards", f"{tmp_path}/*.tar", val_fraction=0.3, image_size=8, num_workers=0
        )
        data.setup("fit")
        return data

    new = module()
    before = module()
    before.sets.hold_out_as_before()
    state = before.state_dict()
    del state["hold_out_rule"]
    assert state["fingerprint"] != new.fingerprint
    new.load_state_dict(state)
    assert np.array_equal(new.train_set.members, before.train_set.members)
    assert new.state_dict()["hold_out_rule"] == 1


def test_arrays_that_say_terabytes():
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    data = b"\x93NUMPY\x01\0" + (118).to_bytes(2, "little") + head.ljust(117) + b"\n" + b"\0" * 64
    with pytest.raises(ValueError, match=r"4000000000000 bytes, but holds 64"):
        array_of(data)
    for kind in ("<f4", ">i2", "?", "<c8"):
        file = io.BytesIO()
        np.save(file, np.asfortranarray(np.arange(6).reshape(2, 3).astype(kind)))
        assert np.array_equal(array_of(file.getvalue()), np.arange(6).reshape(2, 3).astype(kind))


def headed(header, body=b"\0" * 24, version=b"\x01\0"):
    length = len(header).to_bytes(2 if version == b"\x01\0" else 4, "little")
    return b"\x93NUMPY" + version + length + header.encode() + body


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }   \n",
        "{'shape':(2,3),'fortran_order':False,'descr':'<i4'}",
        '{"descr": "<i4", "fortran_order": False, "shape": (2L, 3L)}\n',
    ],
)
@pytest.mark.parametrize("version", [b"\x01\0", b"\x02\0", b"\x03\0"])
def test_headers_of_other_writers(header, version):
    assert array_of(headed(header, version=version)).shape == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': 0, 'shape': (2, 3), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2 3), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2, -3), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': '(2, 3)', }",
        "{'descr': 'number', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<i4', 'fortran_order': False, 'fortran_order': False, }",
        "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), ",
    ],
)
def test_headers_that_are_none(header):
    with pytest.raises(ValueError, match="not a readable array of numbers"):
        array_of(headed(header))


def test_arrays_are_read_without_pythons_syntax(monkeypatch):
    """Python 3.11.7's `ast` fails by chance in threads, which took an index for a broken one."""
    rng = np.random.default_rng(0)
    expected = {}
    for number, kind in enumerate(("<i8", "<f2", ">u2", "|b1", "<U7", "|S3", "<c16")):
        for shape in ((), (0,), (5,), (2, 0, 3), (3, 4, 2)):
            expected[f"{number}-{shape}"] = rng.integers(0, 90, shape).astype(kind)
    file = io.BytesIO()
    np.savez(file, **expected)
    monkeypatch.setattr("ast.parse", None)
    monkeypatch.setattr("ast.literal_eval", None)
    found = arrays_of(file)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x.tar"}, "impossible"),
        ({"bytes": -1}, "impossible"),
        ({"sha256": None}, "impossible"),
        ({"samples": 3}, "does not add up"),
    ],
)
def test_manifests_that_cannot_be(change, message):
    shard = {
        "name": "a.tar",
        "samples": 1,
        "bytes": 5,
        "sha256": "0" * 64,
        "index_sha256": "0" * 64,
    }
    good = {"splits": {"train": {"samples": 1, "shards": [shard]}}}
    assert list(entries(json.dumps(good).encode())) == ["a.tar"]
    shard.update(change)
    with pytest.raises(ValueError, match=message):
        entries(json.dumps(good).encode())
    with pytest.raises(ValueError, match="is not JSON"):
        entries(b"[" * 100_000)
