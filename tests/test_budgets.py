"""The curve over budgets: numbers, codecs at matched bytes, plot and picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from helpers import TINY, images_of
from vistok.evaluation.codecs import (
    CODECS,
    SHRINKS,
    available,
    avif,
    best_within,
    codec_curves,
    jpeg,
    jxl,
    versions,
    webp,
)
from vistok.evaluation.pictures import comparison, grid
from vistok.evaluation.plots import Panel, Series, draw, figure_of, whole_octaves
from vistok.metrics.image import PSNR


def flat(value, size=32):
    return torch.full((3, size, size), value, dtype=torch.uint8)


@pytest.mark.parametrize("codec", [jpeg, webp])
def test_payload_is_the_file_without_its_headers(codec):
    """Headers of one size and quality are alike, whatever the picture; payloads are not."""
    images = [*images_of(6, 32), flat(128)]
    results = [codec(image, 50) for image in images]
    headers = {r.file - r.payload for r in results}
    if codec is webp:  # RIFF, chunk and frame header; chunks are padded to even lengths
        assert headers <= {30, 31}
    else:
        assert len(headers) == 1 and 590 < headers.pop() < 640
    payloads = [r.payload for r in results]
    assert min(payloads) == payloads[-1] < 30 and len(set(payloads)) > 3
    error = (results[-1].picture.int() - 128).abs().max()
    assert error <= 1


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_grey_images_and_quality(name):
    codec, highest = CODECS[name]
    image = images_of(1, 32)[0]
    low, high = codec(image, 0), codec(image, highest)
    assert low.payload < high.payload
    assert (high.picture.int() - image.int()).abs().float().mean() < 8
    assert codec(image[:1], 50).picture.shape == (1, 32, 32)


def test_the_best_quality_within_a_limit():
    image = images_of(1, 32)[0]
    for limit in (60, 100, 200):
        found = best_within(lambda q: jpeg(image, q), 95, limit)
        fitting = [q for q in range(96) if jpeg(image, q).payload <= limit]
        assert found.payload == jpeg(image, max(fitting)).payload <= limit
    assert best_within(lambda q: jpeg(image, q), 95, 3) is None


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_curves_take_the_best_size(name):
    """Beside all sizes and qualities tried one by one."""
    codec, highest = CODECS[name]
    images = images_of(3, 48)
    points = codec_curves(images, [40, 400], name)["payload"]
    assert [p["max_bytes"] for p in points] == [40, 400]
    taken = set()
    for point in points:
        best = []
        for image in images:
            psnr = {}
            for shrink in SHRINKS:
                fitting = [c for q in range(highest + 1) if (c := codec(image, q, shrink)).payload <= point["max_bytes"]]  # fmt: skip
                if fitting:  # the highest quality that fits is the largest payload
                    error = (fitting[-1].picture.double() - image).square().mean() / 255**2
                    psnr[shrink] = -10 * error.log10().item()
            best.append(max(psnr.values()))
            taken.add(max(psnr, key=psnr.get))
        assert point["psnr"] == pytest.approx(sum(best) / 3, abs=0.05)
    assert len(taken) > 1 and max(taken) > 1


def test_small_pictures_keep_their_place():
    """Enlarged again, a flat half is where it was; sides that the factor does not divide too."""
    image = flat(40, 50)
    image[:, :, 25:] = 200
    for shrink in SHRINKS:
        for name, (codec, highest) in CODECS.items():
            if not available()[name]:
                continue
            picture = codec(image, highest, shrink).picture
            assert picture.shape == image.shape
            assert (picture[:, :, :10].float().mean() - 40).abs() < 12
            assert (picture[:, :, -10:].float().mean() - 200).abs() < 12


def test_curves_leave_out_what_does_not_fit():
    images = images_of(4, 32)
    for name in ("jpeg", "webp"):
        points = codec_curves(images, [1, 150, 400], name)["payload"]
        assert [p["max_bytes"] for p in points] == [150, 400], name
        assert points[0]["psnr"] < points[1]["psnr"]
        assert all(p["payload_bytes"] <= p["max_bytes"] for p in points)
        assert all(p["file_bytes"] > p["payload_bytes"] for p in points)


def test_grid_of_pictures():
    pictures = torch.randint(0, 255, (2, 3, 1, 4, 5), dtype=torch.uint8)
    sheet = grid(pictures, gap=2)
    assert sheet.shape == (1, 2 * 6 + 2, 3 * 7 + 2)
    for row in range(2):
        for column in range(3):
            y, x = 2 + row * 6, 2 + column * 7
            assert torch.equal(sheet[:, y : y + 4, x : x + 5], pictures[row, column])
            sheet[:, y : y + 4, x : x + 5] = 255
    assert (sheet == 255).all()
    rows = comparison(pictures[0], pictures[1])
    assert torch.equal(rows, grid(pictures))


def test_plot(tmp_path):
    up, point = Series("a", [1, 4, 16], [10.0, 20.0, 22.0]), Series("b", [8], [21.0])
    panels = [Panel("tokens", "dB", [up]), Panel("bytes", "dB", [up, point])]
    figure = figure_of(panels)
    for axes, panel in zip(figure.axes, panels, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (panel.x_label, panel.y_label)
        for line, series in zip(axes.lines, panel.series, strict=True):
            assert (list(line.get_xdata()), list(line.get_ydata())) == (series.x, series.y)
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == [series.name for series in panel.series]
        places = axes.transData.transform([(x, 10) for x in (1, 2, 4)])[:, 0]
        assert places[2] - places[1] == pytest.approx(places[1] - places[0])  # logarithmic
    draw(panels, tmp_path / "deep" / "p.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["p.png"]
    array = np.asarray(Image.open(tmp_path / "deep" / "p.png").convert("RGB"))
    assert array.shape == (585, 1560, 3)
    blue = (array == (0x1F, 0x5F, 0xB4)).all(-1)
    orange = (array == (0xD1, 0x60, 0x2B)).all(-1)
    assert blue[:, :780].sum() > 300 and not orange[:, :780].any() and orange[:, 780:].any()


@pytest.mark.parametrize(
    ("values", "powers"), [([1, 256], (1, 256)), ([5, 6], (4, 8)), ([3], (2, 4)), ([8], (8, 8))]
)
def test_every_axis_shows_powers_of_two(values, powers):
    low, high = whole_octaves(values)
    assert low < powers[0] and powers[1] < high and low > powers[0] / 2 and high < powers[1] * 2
    axes = figure_of([Panel("x", "y", [Series("a", values, values)])]).axes[0]
    shown = [t for t in axes.get_xticks() if low <= t <= high]
    assert shown == [2**n for n in range(9) if powers[0] <= 2**n <= powers[1]]


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def flexible_run(tmp_path_factory, photos):
    from vistok.cli import train

    run = tmp_path_factory.mktemp("flexible") / "run"
    words = ["experiment=one_d_piece_tiny", *TINY, "data=folder", f"data.train={photos}"]
    words += ["data.val_fraction=0.2", "trainer.max_steps=6", f"hydra.run.dir={run}"]
    assert train([*words, "data.image_size=16"]) == 0
    return run


def test_metrics_per_budget(cli, flexible_run, tmp_path, photos):
    out = tmp_path / "e"
    code, lines, text = cli(
        "evaluate",
        f"run={flexible_run}",
        f"out={out}",
        "eval.num_tokens=[4,1,2]",
        "picture_scale=1",
    )
    assert code == 0, lines
    results = json.loads((out / "metrics.json").read_text())
    rows = results["budgets"]
    assert [row["num_tokens"] for row in rows] == [1, 2, 4]
    assert [row["bits_per_image"] for row in rows] == [4, 8, 16]
    assert [row["bytes"] for row in rows] == [1, 1, 2]
    assert len({row["images"] for row in rows}) == 1 and rows[0]["images"] == results["images"]
    assert rows[-1]["psnr"] == pytest.approx(results["psnr"])
    assert (out / "curve.png").is_file() and (out / "budgets.png").is_file()
    assert "curve.png" in text

    codecs = results["protocol"]["codecs"]
    assert codecs["settings"].keys() == {"jpeg", "webp"} == results["machine"]["codecs"].keys()
    assert codecs["counted"] == ["without headers", "with headers"]
    assert codecs["images"] == 256 and codecs["shrinks"] == list(SHRINKS)
    assert results["machine"]["codecs"]["webp"].startswith("libwebp ")

    tok = vistok.load(flexible_run)
    from vistok.checkpoints.find import find_checkpoint
    from vistok.data.datamodule import VistokDataModule
    from vistok.evaluation.inputs import data_config

    data = VistokDataModule(**data_config(find_checkpoint(flexible_run), [], 8))
    data.setup("validate")
    images = data.val_samples(100)["image"]
    assert len(images) == results["images"]
    for row in rows:
        ids = tok.tokenize(images)[:, : row["num_tokens"]]
        rec = (tok.detokenize(ids) * 255).round().to(torch.uint8)
        psnr = PSNR().per_image(images, rec)
        assert row["psnr"] == pytest.approx(psnr.mean().item(), abs=1e-3)
        assert {len(data) for data in tok.to_bytes(ids)} == {row["bytes"]}
    picture = np.asarray(Image.open(out / "budgets.png"))
    assert picture.shape == (len(images[:12]) * 18 + 2, 4 * 18 + 2, 3)
    assert np.array_equal(picture[2:18, 2:18], images[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("eval.num_tokens=0", "eval.num_tokens=0: must be integers from 1 to 4"),
        ("eval.num_tokens=all", "eval.num_tokens=all: must be integers"),
        ("eval.num_tokens=[true]", "must be integers"),
        ("eval.codec_images=-1", "eval.codec_images=-1: must be a whole number"),
        ("num_pictures=-1", "num_pictures=-1: must be a whole number"),
    ],
)
def test_wrong_words_are_refused_before_images_are_read(
    fails, flexible_run, monkeypatch, word, said
):
    from vistok.data.datamodule import VistokDataModule

    monkeypatch.setattr(VistokDataModule, "setup", None)
    fails("evaluate", f"run={flexible_run}", word, words=said)


def test_budgets_of_a_fixed_length_are_refused(fails, finished_run, flexible_run):
    fails(
        "evaluate", f"run={finished_run}", "eval.num_tokens=[1,2]", words="has a fixed length of 4"
    )
    fails(
        "evaluate", f"run={flexible_run}", "eval.num_tokens=[1,9]", words=("[1, 9]", "from 1 to 4")
    )
    fails("evaluate", f"run={flexible_run}", "eval.steps=3", words="takes no such argument")


@pytest.mark.skipif(not available()["avif"], reason="Pillow without AVIF")
def test_avif_has_its_data_in_one_box():
    images = images_of(2, 32)
    for image in images:
        low, high = avif(image, 5), avif(image, 90)
        assert low.payload < high.payload and low.file - low.payload == high.file - high.payload
        assert (high.picture.int() - image.int()).abs().float().mean() < 8


@pytest.mark.skipif(not available()["jxl"], reason="pip install pillow-jxl-plugin")
def test_jpeg_xl_is_a_bare_codestream():
    images = images_of(2, 32)
    for image in images:
        low, high = jxl(image, 5), jxl(image, 90)
        assert (
            low.payload < high.payload and low.file - low.payload == high.file - high.payload == 2
        )
        assert (high.picture.int() - image.int()).abs().float().mean() < 8
    assert jxl(images[0][:1], 50).picture.shape == (1, 32, 32)
    assert versions(["jxl", "jpeg"])["jxl"].startswith("pillow-jxl-plugin ")


def test_bytes_are_counted_both_ways():
    images = images_of(2, 32)
    curves = codec_curves(images, [700], "jpeg", ["payload", "file"])
    for counted, (point,) in curves.items():
        assert point[f"{counted}_bytes"] <= 700
        assert point == pytest.approx(codec_curves(images, [700], "jpeg", [counted])[counted][0])
    assert point["payload_bytes"] < 150  # headers take most of 700 bytes
