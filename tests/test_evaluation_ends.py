"""The end of an evaluation, after its last image, and requests that are refused before the first."""

import json
import shutil

import pytest
import torch
from PIL import Image

from helpers import make_photos, picture
from vistok.cli import evaluate
from vistok.core.errors import ConfigError
from vistok.data.folders import FolderSource
from vistok.evaluation.engine import Progressing
from vistok.evaluation.pairs import FolderPairs
from vistok.evaluation.plots import Panel, Series, figure_of, svg
from vistok.evaluation.suite import build_suite
from vistok.export.exporter import export_run


def test_the_state_stays_until_everything_is_written(finished_run, tmp_path, monkeypatch):
    """A kill may come while codecs are measured, which takes longer than a small evaluation."""
    from vistok.evaluation.findings import Findings

    photos, out = make_photos(tmp_path / "photos", 5), tmp_path / "out"
    words = [f"run={finished_run}", f"data.val={photos}", "eval=pixels", "batch_size=2"]
    words += ["data.num_workers=0", f"out={out}", "eval.save_seconds=0", "num_pictures=0"]

    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Findings, "_rates", die)
        with pytest.raises(Killed):
            evaluate(words)
    state = torch.load(out / "unfinished" / "rank_0.pt", weights_only=True)
    assert state["batches"] == 3 and len(state["rows"]) == 5
    assert not (out / "metrics.json").exists()
    assert evaluate(words) == 0
    assert not (out / "unfinished").exists()
    gone_on = json.loads((out / "metrics.json").read_text())
    assert evaluate([*words, f"out={tmp_path}/whole"]) == 0
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert gone_on.pop("images_per_second") == pytest.approx(state["speed"][1] / state["speed"][0])
    whole.pop("images_per_second")
    assert gone_on == whole


def test_what_took_less_time_than_saving_is_not_saved(tmp_path):
    progressing = Progressing(tmp_path / "p", "one", 60)
    progressing.write(dict, last=True)
    assert not (tmp_path / "p").exists()
    progressing._begun -= 61
    progressing.write(dict, last=True)
    (tmp_path / "p" / "rank_1.pt").write_bytes(b"of another rank")
    progressing.clear()
    assert not (tmp_path / "p").exists()


def test_other_reconstructions_in_the_same_folder_do_not_go_on(tmp_path):
    originals = FolderSource(str(make_photos(tmp_path / "a", 2)), "data.val", [])
    make_photos(tmp_path / "b", 2)

    def identity(folder):
        return FolderPairs(originals, str(tmp_path / folder), 3, 2).identity

    before = identity("b")
    assert before == identity("b") == identity("a")
    Image.fromarray(picture(9)).save(tmp_path / "b" / "001.png")
    assert identity("b") != before


def test_results_into_a_file_are_refused(finished_run, tmp_path, fails):
    (tmp_path / "file").write_text("mine")
    message = fails("evaluate", f"run={finished_run}", f"out={tmp_path}/file")
    assert message == f"error: out={tmp_path}/file: is a file, not a folder"


def test_weights_that_are_not_at_hand_are_named_as_people_type_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network = {"_target_": "lpips", "net": "alex", "weights": None}
    table = {"lpips_alex": {"_target_": "perceptual", "network": network}}
    settings = {"missing": "error", "metrics": table, "alex": None}
    with pytest.raises(ConfigError, match=r"or set eval\.alex=FILE$") as error:
        build_suite(settings, [0], 3, [(64, 64)])
    assert str(error.value).startswith("eval.metrics.lpips_alex.network.weights=null: AlexNet is")
    del settings["alex"]
    with pytest.raises(ConfigError, match=r"or set weights to a file; hed_vgg"):
        build_suite(settings, [0], 3, [(64, 64)])


def test_a_card_has_no_numbers_of_other_weights(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    photos = make_photos(tmp_path / "photos", 2)
    words = [f"run={run}", f"data.val={photos}", "eval=pixels", "data.num_workers=0"]
    assert evaluate([*words, "num_pictures=0"]) == 0
    results = json.loads((run / "eval" / "metrics.json").read_text())
    export_run(run, tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert results["protocol_hash"] in card and "| format" not in card
    results["model"]["sha256"] = "0" * 64
    (run / "eval" / "metrics.json").write_text(json.dumps(results))
    export_run(run, tmp_path / "other")
    assert results["protocol_hash"] not in (tmp_path / "other" / "README.md").read_text()
    assert "measured with other weights; the card is written without it" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 9])
def test_many_lines_have_their_legend_below(count):
    lines = [Series(f"codec {n} without headers", [64, 128], [n, n + 1]) for n in range(count)]
    panel = Panel("bytes per image", "PSNR", lines)
    figure = figure_of([panel])
    figure.canvas.draw()
    axes = figure.axes[0]
    drawn = axes.get_legend()
    assert drawn is not None
    legend, inside = drawn.get_window_extent(), axes.get_window_extent()
    label = axes.xaxis.label.get_window_extent()
    assert (legend.y1 < label.y0) == (count == 9)
    assert (legend.y0 > inside.y0) == (count == 2)
    assert legend.y0 >= 0 and svg(panel).count("<g id=") > count
