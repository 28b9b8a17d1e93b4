"""Every kind of damage is found and named; whole shards pass."""

import json
import os
import subprocess
import sys

import pytest
from data_helpers import encode, picture

from helpers import ROOT
from vistok import cli
from vistok.data.index import ShardIndex, sidecar
from vistok.data.shards import ShardFile, ShardInfo, ShardWriter, write_manifest


@pytest.fixture
def whole(tmp_path):
    """Nine images in three shards, with captions."""
    folder = tmp_path / "set"
    with ShardWriter(folder, "train") as writer:
        for number in range(9):
            if number in (3, 6):
                writer.roll()
            others = {"txt": b"a picture"}
            data = encode(picture(number))
            writer.write(data, "png", number, size=(40, 56), others=others)
    write_manifest(folder, {"train": writer.shards})
    return folder


def check(capsys, *arguments):
    capsys.readouterr()
    code = cli.check_shards([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def test_whole_shards_pass(whole, capsys):
    for place in (whole, whole / "train-{000000..000002}.tar", whole / "*.tar"):
        code, said = check(capsys, place, "decode=true")
        assert code == 0 and said.splitlines()[-1].startswith("3 shards, 9 images, ")
        assert said.endswith("MB: no problems found\n")
    (whole / "manifest.json").unlink()
    for path in whole.glob("*.idx"):
        path.unlink()
    assert check(capsys, whole, "decode=true")[0] == 0  # any tar of images, without sidecars


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def wrong_size(folder):
    with ShardFile(folder / "train-000001.tar") as shard:
        shard.add("x", encode(picture(0)), "png", size=(40, 57))
    anew(folder)


def repeated(folder):
    with ShardFile(folder / "train-000001.tar") as shard:
        shard.add("000000000", encode(picture(0)), "png", size=(40, 56))
    anew(folder)


def anew(folder):
    """A manifest of what is there."""
    write_manifest(folder, {"train": [ShardInfo.of(tar) for tar in sorted(folder.glob("*.tar"))]})


def other_index(folder):
    sidecar(folder / "train-000001.tar").write_bytes((folder / "train-000000.idx").read_bytes())


def bad_image(folder):
    tar = folder / "train-000001.tar"
    index = ShardIndex.load(sidecar(tar))
    flip(tar, int(index.offsets[1]) + 60)
    anew(folder)  # so that the checksums fit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train-000001.tar").unlink(), "is missing"),
        (lambda f: flip(f / "train-000001.tar", 900), "does not match its checksum"),
        (lambda f: flip(f / "train-000001.idx", 300), "does not match its checksum"),
        (lambda f: (f / "train-000001.idx").unlink(), "has no index"),
        (lambda f: (f / "train-000001.idx").write_bytes(b"x"), "is damaged, or not an index of vistok"),
        (other_index, "its index differs from what is in it (keys"),
        (lambda f: os.truncate(f / "train-000001.tar", 5000), "is cut short"),
        (lambda f: os.truncate(f / "train-000001.tar", 5000), "has 5000 bytes; the manifest says"),
        (lambda f: (f / "train-000003.tar").write_bytes((f / "train-000001.tar").read_bytes()), "is not in the manifest"),
        (repeated, "key 000000000 is in train-000000.tar and in train-000001.tar"),
        (wrong_size, "x is 40x56; the index says 40x57"),
        (bad_image, "000000004 does not decode"),
    ],
)  # fmt: skip
def test_damage_is_named(whole, capsys, damage, message):
    damage(whole)
    code, said = check(capsys, whole, "decode=true", "workers=1", f"report={whole.parent}/r.json")
    assert code == 1 and message in said, said
    report = json.loads((whole.parent / "r.json").read_text())
    problems = [problem for finding in report for problem in finding["problems"]]
    assert any(message.removeprefix("train-000001.tar: ") in problem for problem in problems)
    assert f"{len(problems)} problem" in said.splitlines()[-1]


def test_errors_are_one_line(whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text('{"splits": 3}')
    for arguments, message in [
        ([tmp_path / "empty"], "no shards in this folder"),
        ([tmp_path / "odd"], "manifest.json: damaged"),
        ([tmp_path / "nowhere-*.tar"], "matches no file"),
        ([tmp_path / "nowhere"], "nowhere: no such folder or shard"),
        ([tmp_path / "nowhere" / "a.tar"], "a.tar: no such folder or shard"),
        ([whole, "decod=true"], "decod=: no such option (did you mean 'decode'?)"),
        ([whole, "decode=maybe"], "decode=maybe: must be true or false"),
        ([whole, whole], "expected one folder or pattern of shards, found "),
    ]:
        assert cli.check_shards([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_the_script_and_the_command(whole):
    script = [sys.executable, str(ROOT / "scripts" / "check_shards.py")]
    assert (
        "decode=false" in subprocess.run([*script, "--help"], capture_output=True, text=True).stdout
    )
    (whole / "train-000002.tar").unlink()
    result = subprocess.run([*script, str(whole)], capture_output=True, text=True)
    assert result.returncode == 1 and "train-000002.tar: is missing" in result.stdout
    assert cli.main(["check-shards", str(whole)]) == 1
