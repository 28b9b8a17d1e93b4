"""Distances of distributions against scipy, torch-fidelity, brute force and two processes."""

import json
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist

import ranks
import vistok.losses.pixels  # noqa: F401, registers "mse", which is not a metric
from helpers import PATIENCE, images_of, needs_lite0
from vistok.core.errors import ArgumentError, ConfigError, DataError
from vistok.metrics.build import build_metrics
from vistok.metrics.distribution import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    frechet,
    hashes,
)
from vistok.metrics.image import MSSSIM, PSNR, SSIM, most_scales
from vistok.nn.network import Network

DIM = 6


class Projection(Network):
    """A network that one sees through: a few fixed mixtures of the pixels."""

    name = "projection"
    gives = ("vectors", "logits")
    dim = DIM

    def __init__(self, pixels=3 * 8 * 8):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mix = torch.nn.Parameter(torch.randn(pixels, DIM, generator=generator) / 10)
        self.classes = torch.nn.Parameter(torch.randn(DIM, 5, generator=generator))
        self.calls = 0

    def vectors(self, images):
        self.calls += 1
        return self.normalized(images).flatten(1) @ self.mix

    def classify(self, vectors):
        return vectors @ self.classes


def pair(count=60):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-60, 61, a.shape, generator=generator)
    return a, (0.8 * a.float() + 20 + noise).clamp(0, 255).byte()


def vectors(images):
    with torch.no_grad():
        return Projection().vectors(images.float() / 127.5 - 1).double().numpy()


def measured(metric, a, b, sizes=(7, 20, 0, 33)):
    start = 0
    for size in sizes:
        metric.update(a[start : start + size], b[start : start + size])
        start += size
    assert start == len(a)
    return {name: value.item() for name, value in metric.compute().items()}


def by_scipy(x, y):
    """FID as its authors compute it."""
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)


def test_frechet_is_that_of_the_formula():
    a, b = pair()
    found = measured(FrechetDistance(Projection()), a, b)
    assert found["distance"] == pytest.approx(by_scipy(vectors(a), vectors(b)), rel=1e-6)
    assert found["images"] == 60
    # The corrected one: the line through D(N) and the halves' mean, at 1 / N = 0.
    half = hashes(a, 0).numpy() % 2
    parts = [(by_scipy(vectors(a)[half == h], vectors(b)[half == h]), 1 / (half == h).sum()) for h in (0, 1)]  # fmt: skip
    (d1, n1), (d2, n2) = parts
    slope = ((d1 + d2) / 2 - found["distance"]) / ((n1 + n2) / 2 - 1 / 60)
    assert found["corrected"] == pytest.approx(found["distance"] - slope / 60, rel=1e-5)
    same = measured(FrechetDistance(Projection()), a, a)
    assert same["distance"] == pytest.approx(0, abs=1e-9) and same["corrected"] == pytest.approx(0, abs=1e-9)  # fmt: skip
    plain = measured(FrechetDistance(Projection(), corrected=False), a, b)
    assert set(plain) == {"distance", "images"}
    assert plain["distance"] == pytest.approx(found["distance"], rel=1e-9)


def test_frechet_of_covariances_without_full_rank():
    """Seven vectors in twelve dimensions, against singular values: tr |X^T Y| of centred factors."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 12)), rng.normal(size=(7, 12)) + 0.3
    cx, cy = (v - v.mean(0) for v in (x, y))
    trace = np.linalg.svd(cx @ cy.T / 6, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (cx**2).sum() / 6 + (cy**2).sum() / 6 - 2 * trace  # fmt: skip
    moments = [torch.from_numpy(m) for v in (x, y) for m in (v.mean(0), np.cov(v, rowvar=False))]
    assert frechet(*moments).item() == pytest.approx(expected, rel=1e-7)


def test_the_corrected_distance_is_nearer_to_that_of_the_gaussians():
    """Two known Gaussians of 24 dimensions, of which 100 images are few."""

    truth, plain, corrected = 24 * (0.4**2 + (1.5 - 1) ** 2), [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(2, 100, 24, generator=generator, dtype=torch.float64)
        table[1] = table[1] * 1.5 + 0.4

        class Table(Projection):
            """Reads the number of the image off its pixels."""

            dim = 24

            def vectors(self, images, table=table):
                pixels = ((images + 1) * 127.5).round().long().flatten(1)
                return table[pixels[:, 0], pixels[:, 1]].float()

        images = torch.zeros(2, 100, 3, 8, 8, dtype=torch.uint8)
        images[1, :, 0, 0, 0] = 1
        images[:, :, 0, 0, 1] = torch.arange(100, dtype=torch.uint8)
        metric = FrechetDistance(Table())
        metric.update(images[0], images[1])
        found = metric.compute()
        plain.append(found["distance"].item() - truth)
        corrected.append(found["corrected"].item() - truth)
    # On average D is too large by a tenth of it and more; the correction takes most of that away.
    assert np.mean(plain) > 0.1 * truth
    assert abs(np.mean(corrected)) < 0.4 * np.mean(plain), (truth, plain, corrected)


def test_kid_is_the_unbiased_estimate_over_all_pairs():
    a, b = pair()
    x, y = vectors(a), vectors(b)
    kernel = lambda u, v: (u @ v / DIM + 1) ** 3  # noqa: E731
    n = len(x)
    own = sum(kernel(v[i], v[j]) for v in (x, y) for i in range(n) for j in range(n) if i != j)
    cross = sum(kernel(x[i], y[j]) for i in range(n) for j in range(n))
    expected = own / (n * (n - 1)) - 2 * cross / n**2
    found = measured(KernelDistance(Projection()), a, b)
    assert found == {"distance": pytest.approx(expected, rel=1e-5), "images": 60}


def test_precision_and_recall_by_brute_force():
    a, b = pair()
    b[:20] = 255 - b[:20] // 8  # some that are far away
    x, y = vectors(a), vectors(b)

    def inside(u, others, k):
        distances = np.linalg.norm(others[:, None] - others[None], axis=2)
        radii = np.sort(distances, axis=1)[:, k]
        return (np.linalg.norm(u[:, None] - others[None], axis=2) <= radii).any(axis=1).mean()

    for k in (1, 3):
        found = measured(PrecisionRecall(Projection(), neighbors=k), a, b)
        assert found["precision"] == pytest.approx(inside(y, x, k))
        assert found["recall"] == pytest.approx(inside(x, y, k))
        assert 0 < found["precision"] < 1


def test_inception_score_by_its_definition():
    a, b = pair()
    found = measured(InceptionScore(Projection()), a, b)
    for images, name in ((b, "score"), (a, "original")):
        logits = torch.from_numpy(vectors(images)) @ Projection().classes.detach().double()
        p = logits.softmax(dim=1).numpy()
        expected = math.exp((p * np.log(p / p.mean(0))).sum(1).mean())
        assert found[name] == pytest.approx(expected, rel=1e-5)


def test_torch_fidelity_gives_the_same():
    """Its formulas on the same vectors; its networks are compared in test_networks.py."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    a, b = pair(200)
    x, y = (torch.from_numpy(vectors(v)).float() for v in (a, b))
    sizes = (100, 100)
    fid = measured(FrechetDistance(Projection()), a, b, sizes)["distance"]
    stats = [metric_fid.fid_features_to_statistics(v) for v in (y, x)]
    theirs = metric_fid.fid_statistics_to_metric(*stats, verbose=False)
    assert fid == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    kid = measured(KernelDistance(Projection()), a, b, sizes)["distance"]
    theirs = metric_kid.kid_features_to_metric(y, x, kid_subsets=2, kid_subset_size=200, verbose=False)  # fmt: skip
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-3)
    ours = measured(PrecisionRecall(Projection()), a, b, sizes)
    theirs = metric_prc.prc_features_to_metric(y, x, verbose=False)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-3)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-3)
    logits = Projection().classify(y).detach()
    theirs = metric_isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert measured(InceptionScore(Projection()), a, b, sizes)["score"] == pytest.approx(theirs, abs=1e-3)  # fmt: skip


# ---------------------------------------------------------------------- bounded and the same anywhere


def metrics():
    return {
        "psnr": PSNR(),
        "ssim": SSIM(),
        "fd": FrechetDistance(Projection()),
        "kid": KernelDistance(Projection(), limit=40),
        "pr": PrecisionRecall(Projection(), limit=40),
        "is": InceptionScore(Projection()),
    }


def test_those_that_are_kept_do_not_depend_on_order_and_batches():
    a, b = pair()
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for build in (KernelDistance, PrecisionRecall):
        first = measured(build(Projection(), limit=25), a, b)
        again = measured(build(Projection(), limit=25), a[shuffled], b[shuffled], (13, 47))
        other = measured(build(Projection(), limit=25, seed=1), a, b)
        assert first == pytest.approx(again, rel=1e-4) and first["images"] == 25
        assert build is PrecisionRecall or other != pytest.approx(first, rel=1e-3)
        metric = build(Projection(), limit=25)
        metric.update(a, b)
        assert metric.original.shape == (25, DIM)  # memory is bounded


def run_metrics(world, rank=0):
    a, b = pair(61)
    torch.set_num_threads(1)
    found = {}
    for name, metric in metrics().items():
        mine = slice(0, 45) if (world, rank) == (2, 0) else slice(45, 61) if world == 2 else slice(0, 61)  # fmt: skip
        for x, y in zip(a[mine].split(16), b[mine].split(16), strict=True):
            metric.update(x, y)
        value = metric.compute()
        value = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{k}": v.item() for k, v in value.items()}
    return found


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = run_metrics(2, rank)
    if rank == 1:  # the second one, whose share is the smaller
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_measure_what_one_does(tmp_path):
    """Also when they see different numbers of images."""
    ranks._start_server()
    jobs = [ranks._FORKS.Process(target=worker, args=(rank, str(tmp_path))) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PATIENCE)
    assert [job.exitcode for job in jobs] == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == pytest.approx(run_metrics(1), rel=1e-6)
    assert found["fd.images"] == 61 and found["kid.images"] == 40


def test_reset_forgets_all():
    a, b = pair()
    for metric in metrics().values():
        metric.update(a[:30], b[:30])
        before = metric.compute()
        metric.reset()
        metric.update(a[30:], b[30:])
        metric.compute()
        metric.reset()
        metric.update(a[:30], b[:30])
        after = metric.compute()
        for name in before if isinstance(before, dict) else [...]:
            assert torch.equal(before[name], after[name])


# ---------------------------------------------------------------------- what goes wrong


def test_few_images_are_warned_about_and_said():
    a, b = pair(5)
    metric = FrechetDistance(Projection())
    metric.update(a, b)
    with pytest.warns(UserWarning, match=r"^frechet by projection: 5 images for 6 dimensions: .*too large"):  # fmt: skip
        metric.compute()
    a, b = pair(7)
    metric = FrechetDistance(Projection())
    metric.update(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()
    for build, least in ((FrechetDistance, 2), (KernelDistance, 2), (PrecisionRecall, 4)):
        metric = build(Projection())
        metric.update(a[:1], b[:1])
        with pytest.raises(
            DataError, match=rf"by projection: found 1 image; needs {least} or more$"
        ):
            metric.compute()


@pytest.mark.parametrize("build", [FrechetDistance, KernelDistance, InceptionScore])
def test_features_that_are_not_finite_are_named(build):
    network = Projection()
    with torch.no_grad():
        network.mix[0, 0] = math.nan
    with pytest.raises(DataError, match=r"by projection: projection gives NaN or infinity for 60 of 60 originals$"):  # fmt: skip
        build(network).update(*pair())


def test_images_that_do_not_fit_each_other_are_refused():
    a, b = pair(4)
    for metric in metrics().values():
        with pytest.raises(ConfigError, match=r"originals \(4, 3, 8, 8\) and reconstructions \(4, 3, 8, 4\) differ"):  # fmt: skip
            metric.update(a, b[..., :4])
        with pytest.raises(ConfigError, match=r"reconstructions are torch\.float32; must be torch\.uint8"):  # fmt: skip
            metric.update(a, b.float())
    with pytest.raises(ConfigError, match="projection takes RGB, or grayscale"):
        FrechetDistance(Projection()).update(a[:, :2], b[:, :2])


def test_a_network_that_lacks_something_is_refused():
    class Vectors(Projection):
        gives = ("vectors",)

    with pytest.raises(ArgumentError, match=r"^network=projection: gives no class logits"):
        InceptionScore(Vectors())


# ---------------------------------------------------------------------- from a config


@needs_lite0
def test_metrics_from_a_table_share_networks_and_say_what_they_are():
    lite0 = {"_target_": "lite0", "vector": "stride16"}
    table = {
        "psnr": {"_target_": "psnr"},
        "fd": {"_target_": "frechet", "network": lite0},
        "kid": {"_target_": "kid", "network": dict(lite0), "limit": 10},
        "other": {"_target_": "kid", "network": {**lite0, "vector": "stride32"}},
        "none": None,
    }
    found = build_metrics(table)
    assert list(found) == ["psnr", "fd", "kid", "other"]
    network = found["fd"].network.module
    assert network is found["kid"].network.module is not found["other"].network.module
    calls = []
    original = network.vectors
    network.vectors = lambda images: calls.append(len(images)) or original(images)
    a, b = images_of(3, 32), images_of(3, 32).flip(0)
    for name in ("fd", "kid"):
        found[name].update(a, b)
    assert calls == [3, 3]  # originals and reconstructions, once
    b[0, 0, 0, 0] ^= 1
    found["kid"].update(a, b)
    assert calls == [3, 3, 3]  # what was changed in place is looked at again
    identities = {name: metric.identity() for name, metric in found.items()}
    assert identities["psnr"] == {"name": "psnr", "grows_with": None}
    assert identities["kid"]["limit"] == 10 and identities["fd"]["grows_with"] == "images"
    assert len(identities["fd"]["network"]["sha256"]["weights"]) == 64
    json.dumps(identities)
    assert not any("network" in key for metric in found.values() for key in metric.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"_target_": "psnrr"},
            r"^metrics\.a\._target_=psnrr: no such metric \(did you mean 'psnr'",
        ),
        ({"_target_": "mse"}, r"^metrics\.a\._target_=mse: is a part, expected a metric"),
        ({"_target_": "psnr", "x": 1}, r"^metrics\.a\.x: no such argument of psnr"),
        (
            {"_target_": "kid", "network": {"_target_": "vq", "dim": 2, "codebook_size": 4}},
            r"^metrics\.a\.network=vq: must be a part of class Network",
        ),
        ({"_target_": "ms_ssim", "scales": 0}, r"^metrics\.a\.scales=0: must be a whole number"),
        ({"_target_": "ms_ssim", "scales": 6}, r"^metrics\.a\.scales=6: must be 1 to 5"),
        ({"_target_": "perceptual", "network": None}, r"^metrics\.a\.network=null: must be a part"),
        ("psnr", r"^metrics\.a=psnr: expected a mapping with a _target_"),
    ],
)
def test_wrong_entries_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        build_metrics({"a": options})


# ---------------------------------------------------------------------- several scales


def test_ms_ssim_is_torchmetrics_per_image():
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

    a = images_of(3, (176, 192))
    noise = torch.randint(-30, 31, a.shape, generator=torch.Generator().manual_seed(0))
    b = (a.int() + noise).clamp(0, 255).byte()
    expected = []
    for x, y in zip(a, b, strict=True):
        theirs = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)
        expected.append(theirs(y[None] / 255, x[None] / 255).item())
    metric = MSSSIM()
    metric.update(a, b)
    assert metric.compute().item() == pytest.approx(np.mean(expected), abs=1e-5)
    assert metric.per_image(a, b).tolist() == pytest.approx(expected, abs=1e-5)
    # One scale is SSIM's luminance, contrast and structure.
    with pytest.raises(ConfigError, match=r"32 x 32 px are too small for 5 scales, which need 176 px; scales=2 fits"):  # fmt: skip
        MSSSIM().update(a[..., :32, :32], b[..., :32, :32])
    MSSSIM(2).update(a[..., :32, :32], b[..., :32, :32])


@pytest.mark.parametrize(
    ("side", "scales"),
    [(10, 0), (11, 1), (21, 2), (43, 2), (44, 3), (96, 3), (98, 3), (99, 4), (168, 4), (176, 5)],
)
def test_as_many_scales_as_torchmetrics_takes(side, scales):
    assert most_scales(side) == scales
    a = images_of(1, (side, side + 1))
    if scales:
        assert MSSSIM(scales).per_image(a, a).item() == pytest.approx(1, abs=1e-4)
    if scales < 5:
        with pytest.raises(ConfigError, match="are too small for"):
            MSSSIM(scales + 1).per_image(a, a)


def test_per_image_is_what_the_mean_is_of():
    a, b = pair(9)
    for metric in (PSNR(), SSIM()):
        values = metric.per_image(a, b)
        metric.update(a, b)
        assert metric.compute().item() == pytest.approx(values.double().mean().item(), rel=1e-9)
        changed = b.clone()
        assert torch.equal(metric.per_image(a, changed), values)
        changed[0] = 0
        assert metric.per_image(a, changed)[0] < values[0]
    assert FrechetDistance(Projection()).per_image(a, b) is None
