"""pFID: perturbed codes against brute force, and its mean against a direct computation."""

import io
import json

import numpy as np
import pytest
import scipy.linalg
import torch

import vistok
from helpers import images_of, needs_lite0, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.core.registry import build
from vistok.core.sample_random import drawing, uniform
from vistok.data.folders import FolderSource
from vistok.evaluation.robustness import Perturbation, Robustness, Setting, checked_settings
from vistok.metrics.build import build_metrics
from vistok.metrics.image import PSNR, to_uint8


def brute_force(table, ids, numbers, alpha, delta, seed):
    """Return perturbed ids `(B, N, 1)` of one codebook, token by token in float64."""
    table = table.double().numpy()
    with drawing(seed, torch.tensor(numbers), 0):
        chance, rank = uniform(ids.shape[:2]), uniform(ids.shape)
    changed = ids.clone()
    for b, n in np.ndindex(*ids.shape[:2]):
        if chance[b, n] < alpha:
            order = np.square(table - table[ids[b, n, 0]]).sum(1).argsort(kind="stable")
            changed[b, n, 0] = int(order[int(rank[b, n, 0] * min(delta, len(table)))])
    return changed


def test_codes_become_near_ones_by_brute_force(monkeypatch):
    tokenizer = tiny_tokenizer(tokenizer="titok_tiny").eval()
    size = tokenizer.quantizer.codebook_sizes[0]
    settings = [Setting(0.5, 7), Setting(1.0, 3), Setting(1.0, size + 9)]
    ids = torch.randint(
        size, (3, tokenizer.num_tokens, 1), generator=torch.Generator().manual_seed(0)
    )
    for block in (1 << 22, 5 * size):
        monkeypatch.setattr("vistok.evaluation.robustness._BLOCK_DISTANCES", block)
        found = dict(Perturbation(tokenizer, settings, seed=4).perturbed(ids, [8, 2, 5]))
        for setting in settings:
            expected = brute_force(tokenizer.codebooks()[0], ids, [8, 2, 5], *setting, 4)
            assert torch.equal(found[setting], expected) and not torch.equal(expected, ids)
    # Draws belong to images, whatever batch they come in.
    alone = dict(Perturbation(tokenizer, settings, seed=4).perturbed(ids[1:2], [2]))
    assert torch.equal(alone[settings[0]], found[settings[0]][1:2])
    other = dict(Perturbation(tokenizer, settings, seed=5).perturbed(ids, [8, 2, 5]))
    assert not torch.equal(other[settings[0]], found[settings[0]])


def test_all_near_codes_come_equally_often_and_the_share_is_alpha():
    tokenizer = tiny_tokenizer(tokenizer="titok_tiny").eval()
    count = 200
    ids = torch.full((count, tokenizer.num_tokens, 1), 11)
    found = dict(Perturbation(tokenizer, [Setting(0.5, 4)]).perturbed(ids, range(count)))
    order = torch.cdist(tokenizer.codebooks()[0][11:12], tokenizer.codebooks()[0])[0].argsort()
    shares = (found[Setting(0.5, 4)].flatten()[:, None] == order[:5]).double().mean(0)
    tokens = ids.numel()
    # Of a half that is drawn anew a quarter stays: three standard deviations.
    expected = torch.tensor([0.5 + 0.125, 0.125, 0.125, 0.125, 0.0])
    assert (shares - expected).abs().max() < 3 * (0.25 / tokens) ** 0.5


KINDS = {
    "own": {},
    "several slots": {"_target_": "residual_vq", "codebook_size": 16, "num_layers": 2},
    "scales": {"_target_": "multi_scale_vq", "codebook_size": 16, "scales": [1, 2, 4]},
    "implicit codes": {"_target_": "lfq", "codebook_size": 64},
}


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [("hita_tiny", "own"), *(("titok_tiny", kind) for kind in KINDS)]
)
def test_perturbed_ids_of_every_kind_are_decoded(tokenizer, kind):
    """A joint vocabulary (Hita) as well: each id stays in the codebook of its place."""
    tok = tiny_tokenizer(tokenizer=tokenizer)
    if KINDS[kind]:
        tok.quantizer = build({**KINDS[kind], "dim": tok.quantizer.dim}, "quantizer")
        tok.eval()
    ids = tok.tokenize(images_of(2, tok.image_size))
    perturbation = Perturbation(tok, [Setting(1.0, 10**4)])
    ((_, found),) = perturbation.perturbed(ids, [0, 1])
    assert found.shape == ids.shape and not torch.equal(found, ids)
    for place, (start, size) in enumerate(perturbation.ranges.view(-1, 2).tolist()):
        own = found.flatten(1)[:, place]
        assert ((own >= start) & (own < start + size)).all()
    assert tok.detokenize(found).isfinite().all()


@needs_lite0
@pytest.mark.slow
def test_pfd_of_an_evaluation_is_the_mean_of_direct_ones(cli, finished_run, photos, tmp_path):
    settings = [Setting(1.0, 30), Setting(0.5, 5)]
    pairs = json.dumps([list(s) for s in settings]).replace(" ", "")
    words = [f"run={finished_run}", f"data.val={photos}", "eval=default", "data.num_workers=0"]
    words += ["num_pictures=0", "eval.extremes=0", "eval.codec_images=0", "~eval.metrics.hed_vgg"]
    assert cli("evaluate", *words, "out=plain")[0] == 0
    robust = [f"eval.robustness.settings={pairs}", "eval.robustness.seed=3"]
    for name, batch in (("a", 64), ("b", 5)):
        assert cli("evaluate", *words, *robust, f"out={name}", f"batch_size={batch}")[0] == 0
    plain, a, b = (
        json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("plain", "a", "b")
    )

    tokenizer = vistok.load(finished_run)
    from PIL import Image

    from vistok.data.transforms import Transform

    keys = [key.decode() for key in FolderSource(str(photos), "x", []).keys]
    cut, rng = Transform((16, 16), a["protocol"]["images"]["crop"]), np.random.default_rng(0)
    images = np.stack([cut(np.asarray(Image.open(photos / key)), rng) for key in keys])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    network = build_metrics({"x": {"_target_": "frechet", "network": {"_target_": "lite0"}}})
    network = network["x"].network.module

    def moments(x):
        with torch.no_grad():
            vectors = network.vectors(x.float() / 127.5 - 1).double().numpy()
        return vectors.mean(0), np.cov(vectors, rowvar=False)

    def distance(x):
        (m, s), (n, t) = moments(images), moments(x)
        # A root of the product by the eigenvalues: these covariances have no full rank.
        values, vectors = scipy.linalg.eigh(s)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        trace = np.sqrt(scipy.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
        return np.square(m - n).sum() + np.trace(s) + np.trace(t) - 2 * trace

    ids = tokenizer.tokenize(images)
    expected = []
    for alpha, delta in settings:
        moved = brute_force(tokenizer.codebooks()[0], ids, range(len(keys)), alpha, delta, 3)
        expected.append(distance(to_uint8(tokenizer.detokenize(moved))))
    for found in (a, b):
        rows = [row["fd_lite0"] for row in found["robustness"]]
        assert rows == pytest.approx(expected, rel=1e-3)
        assert found["pfd_lite0"] == pytest.approx(np.mean(expected), rel=1e-3)
        assert found["fd_lite0"] == pytest.approx(plain["fd_lite0"], rel=1e-6)
    assert "pfd_lite0" not in plain and a["higher_is_better"]["pfd_lite0"] is False
    assert a["protocol"]["robustness"] == {"settings": [list(s) for s in settings], "seed": 3}
    assert a["protocol_hash"] == b["protocol_hash"] != plain["protocol_hash"]


@needs_lite0
def test_the_state_goes_on_as_if_nothing_had_happened():
    settings = [Setting(1.0, 3), Setting(0.5, 3)]
    metrics = build_metrics(
        {"fd": {"_target_": "frechet", "network": {"_target_": "lite0"}}, "p": {"_target_": "psnr"}}
    )
    originals = images_of(6, 32)
    others = {settings[0]: originals.flip(2), settings[1]: originals.flip(0)}
    whole, first, second = (Robustness(settings, metrics, False) for _ in range(3))
    whole.update(originals, others)
    first.update(originals[:4], {s: x[:4] for s, x in others.items()})
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    second.update(originals[4:], {s: x[4:] for s, x in others.items()})
    (means, rows), (expected, _) = second.compute(), whole.compute()
    assert means == pytest.approx(expected, rel=1e-6) and means.keys() == {"pfd"}
    assert means["pfd"] == pytest.approx((rows[0]["fd"] + rows[1]["fd"]) / 2)
    assert rows[0]["alpha"] == 1.0 and rows[0]["fd"] != rows[1]["fd"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0.5", "must be a list of"),
        ("[[0.5]]", r"\[0.5\] must be \[alpha, delta\]"),
        ("[[1.5, 3]]", "alpha=1.5 must be 0 to 1"),
        ("[[true, 3]]", "alpha=true must be 0 to 1"),
        ("[[0.5, 0]]", "delta=0 must be 1 or more"),
        ("[[0.5, 2.0]]", "delta=2.0 must be 1 or more"),
        ("[[1, 3], [1.0, 3]]", "twice"),
    ],
)
def test_wrong_settings_are_named(value, words):
    with pytest.raises(ConfigError, match=f"^eval.robustness.settings.*{words}"):
        checked_settings({"settings": json.loads(value), "seed": 0})
    with pytest.raises(ConfigError, match=r"^eval.robustness.seed=-1: must be a whole number"):
        checked_settings({"settings": [], "seed": -1})


def test_it_needs_a_frechet_distance():
    with pytest.raises(ConfigError, match=r"needs a Fréchet distance in eval\.metrics"):
        Robustness([Setting(1.0, 3)], {"psnr": PSNR()}, False)
