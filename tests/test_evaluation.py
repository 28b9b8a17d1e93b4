"""The protocol, pairs from folders, questions back, an evaluation that is killed, and compare."""

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from helpers import PATIENCE, ROOT, images_of, make_photos, picture
from vistok.evaluation import codes
from vistok.evaluation.compare import compared, measured, unlike
from vistok.evaluation.measure import Measurement, flat
from vistok.evaluation.protocol import (
    differences,
    protocol_hash,
    reference_hash,
    stem,
    tensors_hash,
)
from vistok.evaluation.results import extremes
from vistok.metrics.image import PSNR, SSIM

PIXELS = ["eval=pixels", "data.num_workers=0", "num_pictures=0", "eval.extremes=0"]


def results_of(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


# ---------------------------------------------------------------------- the protocol


def test_the_hash_is_that_of_the_canonical_json_and_of_nothing_else():
    protocol = {"b": [1, 2.5, None], "a": {"y": "ä", "x": True}}
    # Written out by hand: keys sorted, no spaces, ASCII. `printf ... | sha256sum` gives the same.
    text = '{"a":{"x":true,"y":"\\u00e4"},"b":[1,2.5,null]}'
    import hashlib

    assert protocol_hash(protocol) == hashlib.sha256(text.encode()).hexdigest()
    turned = {"a": {"x": True, "y": "ä"}, "b": [1, 2.5, None]}
    assert protocol_hash(turned) == protocol_hash(protocol)
    for changed in ({**protocol, "c": 0}, {**protocol, "b": [1, 2.5, 0]}, {"a": protocol["a"]}):
        assert protocol_hash(changed) != protocol_hash(protocol)
    with pytest.raises(ValueError):
        protocol_hash({"a": math.nan})


def test_a_set_of_images_is_known_by_names_and_sizes_in_any_order_and_packing():
    keys, sizes = ["x/a.png", "x/b.JPEG", "c.d"], [5, 6, 7]
    whole = reference_hash(keys, sizes)
    assert reference_hash(["c.d", "x/b", "x/a"], [7, 6, 5]) == whole  # as shards name them
    assert reference_hash(keys, [5, 6, 8]) != whole
    assert reference_hash(["x/a.png", "y/b.JPEG", "c.d"], sizes) != whole
    assert reference_hash(keys[:2], sizes[:2]) != whole
    assert (stem("a/b.png"), stem("a/b.txt"), stem("v1.5/x.webp")) == ("a/b", "a/b.txt", "v1.5/x")


def test_differences_name_the_fields():
    a = {"x": 1, "deep": {"same": [1], "other": "p"}, "only": None}
    b = {"x": 1, "deep": {"same": [1], "other": "q", "more": {"n": 2}}}
    assert [key for key, *_ in differences(a, b)] == ["deep.more", "deep.other", "only"]
    assert differences(a, copy.deepcopy(a)) == []
    assert differences({"a": 1}, {"a": True}) and differences({"a": 1}, {"a": 1.0})


def test_hashes_of_tensors_see_names_types_shapes_and_values():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    own = tensors_hash(tensors)
    assert tensors_hash({"b": tensors["b"], "a": tensors["a"]}) == own
    for other in (
        {**tensors, "a": torch.arange(6.0).view(2, 3)},
        {**tensors, "a": torch.arange(6.0).double()},
        {"c": tensors["a"], "b": tensors["b"]},
        {**tensors, "b": torch.tensor([1.0, 1.01], dtype=torch.bfloat16)},
    ):
        assert tensors_hash(other) != own


@pytest.fixture(scope="module")
def evaluated(finished_run, photos, tmp_path_factory):
    """Evaluate a run with some words; each combination once."""
    from vistok.cli import evaluate

    folder, known = tmp_path_factory.mktemp("evaluated"), {}

    def call(*words):
        if words not in known:
            out = folder / f"{len(known)}"
            assert evaluate([f"run={finished_run}", f"out={out}", *PIXELS, *words]) == 0
            known[words] = out
        return known[words]

    return call


@pytest.mark.slow
def test_what_the_numbers_depend_on_is_in_the_hash_and_nothing_else(evaluated, photos):
    own = results_of(evaluated())
    assert own["protocol_hash"] == protocol_hash(own["protocol"])
    assert own["protocol"]["images"]["count"] == own["images"] == 3
    assert own["protocol"]["metrics"].keys() == {"psnr", "ssim"}
    same = results_of(evaluated("batch_size=2"))
    assert same["protocol_hash"] == own["protocol_hash"]
    assert same["machine"]["batch_size"] == 2 and same["psnr"] == pytest.approx(own["psnr"])
    for words, field in (
        (("weights=last",), "weights"),
        (("precision=bf16",), "precision"),
        (("data.val_crop=tv_center",), "images.crop"),
        ((f"data.val={photos}",), "images.reference"),
        (("~eval.metrics.ssim",), "metrics.ssim"),
        (("eval.code_images=2",), "statistics.images"),
    ):
        other = results_of(evaluated(*words))
        assert other["protocol_hash"] != own["protocol_hash"]
        assert field in [key for key, *_ in differences(own["protocol"], other["protocol"])]
    assert own["model"]["sha256"] != results_of(evaluated("weights=last"))["model"]["sha256"]


def test_the_table_of_images_has_each_once_and_their_mean(evaluated):
    out = evaluated()
    lines = (out / "per_image.csv").read_text().splitlines()
    assert lines[0] == "number,key,psnr,ssim"
    rows = [line.split(",") for line in lines[1:]]
    assert [row[0] for row in rows] == ["0", "1", "2"] and len({r[1] for r in rows}) == 3
    mean = sum(float(row[2]) for row in rows) / 3
    assert results_of(out)["psnr"] == pytest.approx(mean, abs=1e-9)


def test_worst_and_best_follow_the_direction_of_the_metric():
    rows = [{"number": n, "key": f"k{n}", "up": float(n), "down": float(-n)} for n in range(5)]
    rows[2]["up"] = math.nan
    found = extremes(rows, {"up": True, "down": False, "absent": True}, 2)
    assert [x["number"] for x in found["up"]["worst"]] == [0, 1]
    assert [x["number"] for x in found["up"]["best"]] == [4, 3]
    assert [x["number"] for x in found["down"]["best"]] == [4, 3] and "absent" not in found


# ---------------------------------------------------------------------- measuring


def test_state_of_a_measurement_goes_on_as_if_nothing_had_happened():
    originals, others = images_of(6), images_of(6).flip(0)
    metrics = lambda: {"psnr": PSNR(), "ssim": SSIM()}  # noqa: E731
    whole, first = Measurement(metrics()), Measurement(metrics())
    whole.update(originals, others)
    first.update(originals[:4], others[:4])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = Measurement(metrics())
    second.load_state_dict(torch.load(buffer, weights_only=True))
    second.update(originals[4:], others[4:])
    assert second.compute() == pytest.approx(whole.compute(), rel=1e-9)


def test_results_of_several_parts_get_names():
    value = {"distance": torch.tensor(2.0), "corrected": torch.tensor(1.0), "images": 7}
    assert flat("fd", value) == {"fd": 2.0, "fd_corrected": 1.0, "fd_images": 7}
    assert flat("psnr", torch.tensor(3.0)) == {"psnr": 3.0} and flat("x", None) == {}


# ---------------------------------------------------------------------- statistics of ids


def test_entropies_and_ngrams_by_brute_force():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (7, 6, 2)) ** 2 % 5
    found = codes.statistics(ids, [5, 5])

    def entropy(items):
        counts = Counter(items)
        total = sum(counts.values())
        return -sum(c / total * math.log2(c / total) for c in counts.values())

    both = [entropy(ids[..., q].flatten().tolist()) for q in (0, 1)]
    assert found["entropy"] == pytest.approx(sum(both) / 2)
    for place in range(6):
        here = [entropy(ids[:, place, q].tolist()) for q in (0, 1)]
        assert found["position_entropy"][place] == pytest.approx(sum(here) / 2)
    before = 0.0
    for n in (1, 2, 3, 4):
        grams = [tuple(row[i : i + n]) for row in ids[..., 0].tolist() for i in range(6 - n + 1)]
        block = entropy(grams)
        own = found["ngrams"][str(n)]
        assert own["distinct"] == len(set(grams)) and own["count"] == len(grams)
        assert own["entropy"] == pytest.approx(block)
        assert own["conditional_entropy"] == pytest.approx(block - before)
        before = block
    seen = found["innovation"]
    for images, distinct in seen:
        assert distinct == len(np.unique(ids[:images, :, 0]))
    assert found["usage_expected"] == pytest.approx(1 - 0.8**42)


def test_large_vocabularies_count_ngrams_without_one_number_for_each():
    ids = np.random.default_rng(0).integers(0, 3, (9, 5, 1)) * (2**18 // 3)
    small = codes.statistics(ids // (2**18 // 3), [3])
    assert codes.statistics(ids, [2**18])["ngrams"] == small["ngrams"]


@pytest.mark.parametrize("slope", [0.7, 1.0, 1.4])
def test_zipf_finds_the_slope_of_its_own_law(slope):
    counts = np.round(1e6 * np.arange(1, 300.0) ** -slope).astype(int)
    rare = np.ones(5000, dtype=int)  # below five: not fitted
    found = codes.zipf(np.concatenate([rare, counts]))
    assert found["slope"] == pytest.approx(slope, abs=0.01) and found["r2"] > 0.999
    assert found["ranks"] == (counts >= 5).sum()
    assert codes.zipf(np.array([9, 1])) is None


def test_compressibility_tells_order_from_frequencies():
    rng = np.random.default_rng(0)
    random = rng.integers(0, 256, (50, 64, 1))
    flat_found = codes.compression(random, [256])
    assert flat_found["packed_bytes"] == 50 * 64
    assert flat_found["zlib"] > 0.99 and flat_found["shuffled_zlib"] > 0.99
    ordered = np.tile(np.arange(64).reshape(1, 64, 1) * 3, (50, 1, 1))
    found = codes.compression(ordered, [256])
    assert found["zlib"] < 0.05 < 0.5 < found["shuffled_zlib"]
    packed = ordered.astype(np.uint8).tobytes()
    assert found["zlib"] == len(zlib.compress(packed, 9)) / len(packed)
    twelve = codes.compression(random, [4096])  # 12 bits each
    assert twelve["packed_bytes"] == 50 * 64 * 12 // 8


def test_effect_maps_find_the_pixels_of_a_token():
    """A decoder that paints each token's own quarter, and nothing else."""

    class Painter:
        class quantizer:
            codebook_sizes = (7,)

        def detokenize(self, ids):
            return (ids.float() / 10).view(-1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)  # fmt: skip

    ids = torch.randint(0, 7, (3, 4, 1))
    places, maps = codes.effect_maps(Painter(), ids, {})
    assert places == [0, 1, 2, 3] and maps.shape == (4, 8, 8)
    for token in range(4):
        y, x = 4 * (token // 2), 4 * (token % 2)
        inside = maps[token, y : y + 4, x : x + 4]
        assert inside.min() > 0 and maps[token].sum() == pytest.approx(inside.sum())


# ---------------------------------------------------------------------- other programs' images


@pytest.fixture
def two_folders(tmp_path):
    """Originals in subfolders as PNG, reconstructions as WebP, both of two sizes."""
    originals, others = tmp_path / "originals", tmp_path / "others"
    pairs = {}
    for number in range(7):
        size = (24, 24) if number % 3 else (20, 32)
        a = picture(number, *size)
        b = np.clip(a.astype(int) + (number + 1), 0, 255).astype(np.uint8)
        for folder, array, name in ((originals, a, "png"), (others, b, "webp")):
            path = folder / f"set{number % 2}" / f"{number:03d}.{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path, **({"lossless": True} if name == "webp" else {}))
        pairs[f"{number:03d}"] = a, b
    return originals, others, pairs


def test_images_of_another_program(cli, two_folders, tmp_path):
    originals, others, pairs = two_folders
    words = [f"images={others}", f"data.val={originals}", "eval=pixels", "batch_size=2"]
    code, lines, out = cli("evaluate", *words)
    assert code == 0, lines
    results = results_of(tmp_path / "others_eval")
    expected = []
    for a, b in pairs.values():
        expected.append(10 * math.log10(255**2 / np.square(a.astype(float) - b).mean()))
    assert results["psnr"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert results["images"] == 7 and "7 images of" in out
    assert results["protocol"]["weights"] == "not known" and "codebook_usage" not in results
    assert (tmp_path / "others_eval" / "report.html").is_file()
    assert {p.name for p in others.iterdir()} == {"set0", "set1"}  # nothing is written there


def test_originals_are_cut_when_asked(cli, fails, tmp_path):
    originals, others = tmp_path / "a", tmp_path / "b"
    make_photos(originals, 3, height=40, width=60)
    others.mkdir()
    from vistok.data.transforms import Transform

    for path in originals.iterdir():
        cut = Transform((16, 24), "adm_center")(
            np.asarray(Image.open(path)), np.random.default_rng(0)
        )
        Image.fromarray(cut).save(others / path.name)
    words = [f"images={others}", f"data.val={originals}", "eval=pixels"]
    fails("evaluate", *words, words=("000.png is 16x24", "40x60", "data.val_crop=adm_center"))
    fails("evaluate", *words, "data.image_size=16", words=("data.val_crop", "together"))
    cut = ["data.val_crop=adm_center", "data.image_size=[16,24]"]
    assert cli("evaluate", *words, *cut, "out=e")[0] == 0
    assert results_of(tmp_path / "e")["psnr"] == 100
    measured = results_of(tmp_path / "e")["protocol"]["images"]
    assert (measured["crop"], measured["height"], measured["width"]) == ("adm_center", 16, 24)


def test_bad_folders_are_one_clear_line(fails, two_folders, tmp_path):
    originals, others, _ = two_folders
    base = ["eval=pixels", f"data.val={originals}"]
    (tmp_path / "empty").mkdir()
    fails("evaluate", f"images={tmp_path}/empty", *base, words=("images=", "no images"))
    fails(
        "evaluate", f"images={others}", "eval=pixels", f"data.val={tmp_path}/empty",
        words=("data.val=", "no images"),
    )  # fmt: skip
    fails("evaluate", f"images={tmp_path}/nope", *base, words=("images=", "no such folder"))
    fails("evaluate", f"images={others}", "eval=pixels", words=("data.val", "which originals"))
    fails("evaluate", f"images={others}", "eval.num_tokens=4", *base, words="have no tokens")
    fails("evaluate", f"images={others}", "run=x", *base, words="not several")
    lone = make_photos(tmp_path / "lone", 2) / "000.png"
    lone.rename(lone.with_name("stranger.png"))
    (tmp_path / "lone" / "001.png").unlink()
    fails("evaluate", f"images={tmp_path}/lone", *base, words=("stranger.png", "no original"))
    (others / "set1" / "001.webp").unlink()
    fails("evaluate", f"images={others}", *base, words=("6 images for 7 originals", "set1/001"))
    (others / "set1" / "001.webp").write_bytes(b"RIFF no picture")
    fails("evaluate", f"images={others}", *base, words=("set1/001.webp", "not an image"))


def test_an_export_asks_which_images(fails, cli, exported, photos, tmp_path):
    for key in ("run", "model"):
        fails("evaluate", f"{key}={exported}", words=("which images", "data=folder data.val="))
    fails("evaluate", "eval=pixels", words=("run", "eval run="))
    fails("evaluate", f"model={exported}", f"images={photos}", words="not several")
    words = [f"model={exported}", "data=folder", f"data.val={photos}", "out=e", *PIXELS]
    code, _, out = cli("evaluate", *words)
    assert code == 0 and f"22 images of {photos}" in out
    assert results_of(tmp_path / "e")["data"] == str(photos)


def test_wrong_settings_are_refused(fails, finished_run, tmp_path):
    run = f"run={finished_run}"
    (tmp_path / "none").mkdir()
    fails(
        "evaluate", run, "data=folder", f"data.val={tmp_path}/none", "eval=pixels",
        words=("error: data.val=", "no images"),
    )  # fmt: skip
    fails("evaluate", run, "eval.robustness.settings=[[2,3]]", words="alpha=2 must be 0 to 1")
    fails(
        "evaluate", run, "eval=pixels", "eval.robustness.settings=[[1,3]]",
        words=("eval.robustness.settings", "needs a Fréchet distance"),
    )  # fmt: skip
    fails("evaluate", run, "eval=ful", words=("eval=ful", "full"))
    fails("evaluate", run, "eval.codecs=[gif]", words=("eval.codecs", "gif", "jpeg"))
    fails("evaluate", run, "eval.missing=maybe", words=("eval.missing=maybe", "leave_out"))
    fails("evaluate", run, "eval.save_seconds=-1", words="eval.save_seconds=-1")
    fails(
        "evaluate", run, "+eval.metrics.x._target_=psn", "eval=pixels",
        words=("eval.metrics.x._target_=psn", "psnr"),
    )  # fmt: skip


# ---------------------------------------------------------------------- kills and ranks


def start(words, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(finished_run, tmp_path):
    photos = make_photos(tmp_path / "photos", 24)
    words = [f"run={finished_run}", f"data.val={photos}", "eval=pixels", "batch_size=1"]
    words += ["eval.save_seconds=0", "data.num_workers=0"]
    code = subprocess.run([sys.executable, ROOT / "eval.py", *words, f"out={tmp_path}/whole"],
                          capture_output=True, timeout=PATIENCE).returncode  # fmt: skip
    assert code == 0
    state = tmp_path / "killed" / "unfinished" / "rank_0.pt"
    job = start([*words, f"out={tmp_path}/killed"])
    end = time.monotonic() + PATIENCE
    while not state.exists():
        assert time.monotonic() < end and job.poll() is None, job.communicate()
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=PATIENCE)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    done = torch.load(state, weights_only=True)["batches"]
    assert 1 <= done < 24
    out, _ = start([*words, f"out={tmp_path}/killed"]).communicate(timeout=PATIENCE)
    assert f"going on after {done} of 24 batches" in out
    whole, killed = (results_of(tmp_path / name) for name in ("whole", "killed"))
    for timing in ("images_per_second",):
        whole.pop(timing), killed.pop(timing)
    assert killed == whole
    tables = [(tmp_path / n / "per_image.csv").read_bytes() for n in ("whole", "killed")]
    assert tables[0] == tables[1] and not state.parent.exists()


def test_the_state_of_another_evaluation_is_not_taken_up(tmp_path):
    from vistok.evaluation.engine import Progressing

    progressing = Progressing(tmp_path / "p", "one", 0)
    progressing.write(lambda: {"batches": 3})
    assert progressing.read()["batches"] == 3
    assert Progressing(tmp_path / "p", "two", 0).read() is None
    (tmp_path / "p" / "rank_0.pt").write_bytes(b"cut short")
    assert progressing.read() is None
    progressing.clear()
    assert not (tmp_path / "p").exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_measure_what_one_does(finished_run, tmp_path):
    """Each of 7 images once, though they do not divide by two; equal to 1e-6. Codecs by one."""
    photos = make_photos(tmp_path / "photos", 7)
    (photos / "003.png").write_bytes(b"no picture")
    words = [f"run={finished_run}", f"data.val={photos}", "eval=pixels", "batch_size=2"]
    words += ["data.num_workers=0", "data.max_skipped_share=1"]
    words += ["eval.codecs=[jpeg]", "eval.codecs_always=true"]
    one = start([*words, f"out={tmp_path}/one"])
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared["TORCHELASTIC_RUN_ID"] = "x"
    jobs = [start([*words, f"out={tmp_path}/two"], RANK=r, LOCAL_RANK=r, **shared) for r in "01"]
    for job in (one, *jobs):
        _, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, err
    first, second = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert second["machine"]["ranks"] == 2 and second["images"] == first["images"] == 6
    assert second["skipped_images"] == 1
    assert second["protocol_hash"] == first["protocol_hash"]
    for key in ("psnr", "ssim", "codebook_usage", "perplexity", "dead_codes"):
        assert second[key] == pytest.approx(first[key], rel=1e-6), key
    assert second["codes"] == first["codes"]
    assert second["rates"] == first["rates"] and first["rates"]["codecs"]["payload"]["jpeg"]
    tables = [(tmp_path / n / "per_image.csv").read_text() for n in ("one", "two")]
    keys = [[line.split(",")[1] for line in table.splitlines()] for table in tables]
    assert keys[0] == keys[1] and len(keys[0]) == 7


# ---------------------------------------------------------------------- compare


def test_compare(cli, fails, evaluated, finished_run, tmp_path):
    a, b = evaluated(), evaluated("batch_size=2")
    code, _, out = cli("compare", a, b, "out=table.md")
    assert code == 0 and "psnr" in out and "protocol" in out
    table = (tmp_path / "table.md").read_text()
    assert f"{results_of(a)['psnr']:.4g}" in table and "warning" not in table
    other = evaluated("weights=last")
    fails("compare", a, other, words=("unlike protocols", "weights (ema / last)", "anyway=true"))
    code, _, out = cli("compare", a, other, "anyway=true", "out=table.md")
    assert code == 0 and "weights (ema / last)" in " ".join(out.split())
    assert "warning" in (tmp_path / "table.md").read_text()
    fails("compare", a, words="two or more")
    fails("compare", a, tmp_path / "nope", words=("nope", "no such folder"))
    fails("compare", a, finished_run, words=("not evaluated yet", "eval"))


def test_compare_marks_the_better_number(evaluated):
    base = measured(evaluated())
    worse = {**base, "psnr": base["psnr"] - 1, "images_per_second": 1.0}
    assert unlike({"a": base, "b": worse}) == []
    lines = {line[0]: line[1:] for line in compared({"a": base, "b": worse})}
    assert lines["psnr"][0].endswith("*") and not lines["psnr"][1].endswith("*")
    assert lines["images"] == ["3", "3"] and lines["protocol"][0] == base["protocol_hash"][:12]


def test_results_whose_protocol_was_edited_are_refused(evaluated, fails, tmp_path):
    results = results_of(evaluated())
    results["protocol"]["weights"] = "last"
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "metrics.json").write_text(json.dumps(results))
    fails("compare", evaluated(), tmp_path / "e", words=("damaged", "protocol_hash"))


def test_loaded_weights_are_those_that_are_named(evaluated, finished_run):
    from vistok.evaluation.protocol import weights_hash

    sha = results_of(evaluated())["model"]["sha256"]
    assert sha == weights_hash(vistok.load(finished_run))
