"""scripts/zoo.py trains each row once, continues what was under way, and tables what is there."""

import importlib.util
import json

import pytest
from PIL import Image

from helpers import ROOT, TINY, picture
from vistok.tools.make_shards import TOOL

SMALL = [word for word in TINY if not word.startswith(("data.", "trainer.max_steps", "init_im"))]


@pytest.fixture(scope="module")
def zoo():
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "scripts/zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_names_configs_that_exist(zoo):
    for words in zoo.ROWS.values():
        for word in words:
            group, _, name = word.partition("=")
            if "." not in group:
                assert (ROOT / "configs" / group / f"{name}.yaml").is_file(), word
    slugs = [zoo.slug(name) for name in zoo.ROWS]
    assert len(set(slugs)) == len(slugs) >= 12
    assert set(zoo.SEEDED) <= set(zoo.ROWS)


def test_seeds_and_choices(zoo):
    chosen = {**zoo.DEFAULTS, "rows": "titok_tiny,vqgan_tiny-var", "seeds": "0,7"}
    jobs = zoo.planned(chosen)
    assert list(jobs) == ["titok_tiny, seed 0", "titok_tiny, seed 7", "vqgan_tiny, var"]
    assert jobs["titok_tiny, seed 7"][-1] == "seed=7" and jobs["vqgan_tiny, var"][-1] == "seed=0"
    with pytest.raises(SystemExit, match="no such row"):
        zoo.planned({**chosen, "rows": "titok"})


@pytest.mark.slow
def test_the_table_is_made_of_runs_that_are_trained_once(zoo, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.fromarray(picture(number)).save(tmp_path / "photos" / f"{number}.png")
    assert TOOL([str(tmp_path / "photos"), f"out={tmp_path / 'set'}", "workers=1"]) == 0
    shards = str(next((tmp_path / "set").glob("*.tar")))
    rows = {"titok_tiny": ["experiment=titok_tiny"], "bad": ["experiment=nothing"]}
    monkeypatch.setattr(zoo, "ROWS", rows)
    words = [f"train={shards}", f"val={shards}", f"out={tmp_path / 'zoo'}", "samples=64", "seeds=0"]
    words += ["image_size=16", "pictures=2", "init_images=8", "data.num_workers=0", *SMALL]
    assert zoo.main([*words, "rows=bad"]) == 1
    assert "failed: bad: see" in capsys.readouterr().out
    assert zoo.main([*words, "rows=titok_tiny"]) == 0
    (row,) = json.loads((tmp_path / "zoo" / "table.json").read_text())
    assert row["row"] == "titok_tiny" and row["samples_seen"] == 64 and row["images"] == 12
    assert row["psnr"] > 5 and row["parameters"] > 0
    assert (tmp_path / "zoo" / "table.md").read_text().count("\n") == 3
    assert Image.open(tmp_path / "zoo" / "sheet.png").height == 2 * (16 * 2 + 4)
    monkeypatch.setattr(zoo, "command", lambda *_: pytest.fail("what is done is done again"))
    assert zoo.main([*words, "rows=titok_tiny"]) == 0
