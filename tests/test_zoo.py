"""scripts/zoo.py trains each row once, continues what was under way, and tables what is there."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import PATIENCE, ROOT, TINY, images_of, needs_lite0, picture
from vistok.tools.make_shards import TOOL

SMALL = [word for word in TINY if not word.startswith(("data.", "trainer.max_steps", "baseline"))]


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("zoo")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "photos").mkdir()
    for number in range(12):
        Image.fromarray(picture(number)).save(folder / "photos" / f"{number}.png")
    assert TOOL([str(folder / "photos"), f"out={folder / 'set'}", "workers=1"]) == 0
    shards = str(next((folder / "set").glob("*.tar")))
    words = [f"train={shards}", f"val={shards}", "image_size=16", "pictures=2", "seeds=0"]
    return [*words, "samples=64", "data.num_workers=0", *SMALL]


def test_all_tiny_presets_of_tokenizers_are_rows(zoo):
    rows, names = zoo.rows(), {p.stem for p in (ROOT / "configs/experiment").glob("*_tiny.yaml")}
    priors = {"ar_gpt_tiny", "maskgit_prior_tiny"}
    assert set(rows) - set(zoo.TWINS) == names - priors
    assert set(zoo.TWINS) <= set(rows) and set(zoo.SEEDED) <= set(rows)
    assert set(zoo.TEXTS) <= names and len(rows) >= 20
    slugs = [zoo.slug(name) for name in rows]
    assert len(set(slugs)) == len(slugs)


@pytest.mark.parametrize(
    "name", ["one_d_piece_tiny, full", "llamagen_tiny, hed_vgg, adaptive adversary"]
)
def test_twins_are_composed(zoo, name):
    from helpers import config_of

    twin, base = (config_of(*words) for words in (zoo.rows()[name], [zoo.rows()[name][0]]))
    assert twin["tokenizer"].keys() == base["tokenizer"].keys()
    assert twin["optimizer"] == base["optimizer"] and twin != base


def test_seeds_choices_and_order(zoo):
    chosen = {**zoo.DEFAULTS, "rows": "titok_tiny,vqgan_tiny,titok_tiny-adversary", "seeds": "3,7"}
    jobs = zoo.planned(chosen)
    names = ["titok_tiny, seed 3", "titok_tiny, seed 7", "vqgan_tiny", "titok_tiny, adversary"]
    assert list(jobs) == names
    assert jobs["titok_tiny, seed 7"][-1] == "seed=7" and jobs["vqgan_tiny"][-1] == "seed=3"
    ordered = [name for name, _ in zoo.in_order(jobs)]
    assert ordered == [names[0], names[2], names[3], names[1]]
    with pytest.raises(SystemExit, match="no row titok"):
        zoo.planned({**chosen, "rows": "titok"})
    with pytest.raises(SystemExit, match="no phase tabel"):
        zoo.main(["only=tabel"])


def test_a_longer_run_is_not_taken_for_a_shorter_one(zoo, tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 9}')
    assert "has 9 steps, not 2" in zoo.trained(tmp_path, [], {"samples": "64"})
    assert "not trained" in zoo.evaluated(tmp_path / "other")


def test_notes_name_what_differs(zoo):
    from vistok.evaluation.protocol import protocol_hash

    def row(name, **protocol):
        whole = {"protocol": protocol, "protocol_hash": protocol_hash(protocol), "images": 5}
        more = {"samples_seen": 64.0, "alarms": [], "skipped_steps": 0, "returns": 0}
        return {"row": name, **whole, **more}

    rows = [row("a", steps=1), row("b", steps=1), row("c", steps=2) | {"alarms": ["usage: 1 %"]}]
    text = "\n".join(zoo.table.notes(rows))
    assert f"Protocol `{rows[0]['protocol_hash'][:12]}`, 5 images." in text
    assert f"`{rows[2]['protocol_hash'][:12]}`, which differs in steps: c." in text
    assert "Alarm of c: usage: 1 %" in text and "Samples seen: 64." in text


def test_references_take_the_bytes_they_are_given(zoo, tmp_path):
    images = images_of(3, size=64)
    ((limit, pictures),) = zoo.measure.coded(images, "jpeg", [200])
    assert limit == 200 and pictures.shape == images.shape
    error = float((pictures.float() - images).square().mean())
    assert 0 < error < 255**2 / 100  # more than 20 dB
    keys = ["a.jpg", "b/c", "d"]
    zoo.measure.save(pictures, keys, tmp_path / "jpeg_200")
    assert sorted(p.name for p in (tmp_path / "jpeg_200").iterdir()) == [
        "a.png",
        "b_c.png",
        "d.png",
    ]
    assert torch.equal(zoo.measure.load_pictures(tmp_path / "jpeg_200", keys), pictures)

    class Data:
        image_size, num_train, init_batches = (64, 64), 3, staticmethod(lambda count: images)

    made = zoo.measure.clustered(Data, images, 80)
    patches = made.unfold(2, 8, 8).unfold(3, 8, 8).movedim(1, 3).reshape(-1, 192)
    assert len(patches.unique(dim=0)) <= 2**10 and made.shape == images.shape
    assert zoo.measure.clustered(Data, images, 1) is None


@needs_lite0
@pytest.mark.slow
def test_the_table_is_made_of_runs_that_are_trained_once(zoo, words, tmp_path, monkeypatch, capsys):
    rows = {"titok_tiny": ["experiment=titok_tiny"], "bad": ["experiment=nothing"]}
    monkeypatch.setattr(zoo, "rows", lambda: rows)
    out = tmp_path / "zoo"
    words = [*words, f"out={out}", "only=train,evaluate,references,speed,table"]
    assert zoo.main(words) == 1
    assert f"failed: bad: see {out}/runs/bad.log" in capsys.readouterr().out
    trained, kmeans = json.loads((out / "table.json").read_text())
    assert trained["row"] == "titok_tiny" and trained["samples_seen"] == 64
    assert trained["images"] == trained["fd_lite0_images"] == kmeans["images"] == 12
    assert trained["psnr"] > 5 and trained["parameters"] > 0 and trained["seconds"] > 0
    assert trained["images_per_second"] < trained["decode_per_second"]
    assert kmeans["row"] == "k-means over patches, 2 bytes" and 10 < kmeans["psnr"] < 40
    text = (out / "table.md").read_text()
    assert text.splitlines()[2].startswith("| titok_tiny |") and "N" in text.splitlines()[0]
    assert f"Protocol `{trained['protocol_hash'][:12]}`, 12 images." in text
    assert Image.open(out / "sheet.png").height == 3 * (16 * 8 + 4)
    monkeypatch.setattr(zoo, "command", lambda *_: pytest.fail("what is done is done again"))
    assert zoo.main([*words, "rows=titok_tiny"]) == 0


@pytest.mark.slow
def test_it_goes_on_after_a_kill(words, tmp_path):
    out = tmp_path / "zoo"
    words = [w for w in words if not w.startswith("samples=")]
    words += [f"out={out}", "samples=2560", "rows=titok_tiny", "only=train"]
    command = [sys.executable, str(ROOT / "scripts/zoo.py"), *words]
    run = out / "runs" / "titok_tiny"
    zoo = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert zoo.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(zoo.pid, signal.SIGKILL)
    zoo.wait()
    assert not (run / "summary.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 80 and 0 < summary["resumed_at_step"] < 80


def test_texts_are_added_to_each_sample(zoo, words, tmp_path):
    shards = words[0].removeprefix("train=")
    folder = zoo.measure.texts_added(shards, tmp_path / "texts")
    with tarfile.open(shards) as source, tarfile.open(next(folder.glob("*.tar"))) as copy:
        names, found = source.getnames(), copy.getnames()
        assert [name for name in found if not name.endswith(".text.npy")] == names
        assert all(copy.extractfile(n).read() == source.extractfile(n).read() for n in names)
        texts = [name for name in found if name.endswith(".text.npy")]
        assert len(texts) == 12 and found.index(texts[0]) < found.index(names[-1])
        text = np.load(io.BytesIO(copy.extractfile(texts[0]).read()))
        assert text.tolist() == [[0.0]] and text.dtype == np.float32
    assert zoo.measure.texts_added(shards, tmp_path / "texts") == folder
