"""Discriminators, losses and weights of GANs against their definitions; see also test_adversary.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers import TINY, compared, config_of
from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.sample_random import aside, drawing, uniform
from vistok.core.taps import Taps
from vistok.losses.entry import Entry
from vistok.losses.gan import players
from vistok.losses.gan.adversary import Adversary
from vistok.losses.gan.augment import DiffAugment
from vistok.losses.gan.dino import DinoDiscriminator
from vistok.losses.gan.discriminators import ActNorm, MaskBitDiscriminator, PatchDiscriminator
from vistok.losses.gan.released import load_discriminator
from vistok.losses.gan.stylegan import StyleGANDiscriminator, minibatch_deviation
from vistok.losses.gradients import adaptive_scale, carried, leaf_of, picture_scale
from vistok.losses.objective import build_objective
from vistok.models.build import build_tokenizer
from vistok.models.term import Step
from vistok.training.optimizers import build_optimizer

OPTIONS = {"lr": 1e-3, "betas": [0.5, 0.9], "weight_decay": 0.0}


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shaken(module):
    """Leave nothing at 0 or 1, where a mistake would not show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p) * (1 if p.ndim < 2 else p.std()))
    return module


# ---------------------------------------------------------------------- discriminators
# Against the released code itself: patch (batch and act), StyleGAN (LlamaGen), MaskBit (TiTok) and
# DINO-S (ImageFolder) gave equal logits, the largest difference 3e-6 of 2.8. Here against plain formulas.


def patch_formula(w, x, norm):
    """pix2pix's discriminator by the published names, of two halvings."""
    x = F.leaky_relu(F.conv2d(x, w["main.0.weight"], w["main.0.bias"], 2, 1), 0.2)
    for conv, stride in ((2, 2), (5, 1)):
        x = F.conv2d(x, w[f"main.{conv}.weight"], w.get(f"main.{conv}.bias"), stride, 1)
        own = {k.rpartition(".")[2]: v for k, v in w.items() if k.startswith(f"main.{conv + 1}.")}
        if norm == "batch":
            args = own["running_mean"], own["running_var"], own["weight"], own["bias"]
            x = F.batch_norm(x, *args)
        else:
            x = own["scale"] * (x + own["loc"])
        x = F.leaky_relu(x, 0.2)
    return F.conv2d(x, w["main.8.weight"], w["main.8.bias"], 1, 1)


@pytest.mark.parametrize("norm", ["batch", "act"])
@pytest.mark.parametrize("place", ["discriminator", "prefix"])
def test_released_patch_weights_give_their_logits(tmp_path, norm, place):
    net = shaken(PatchDiscriminator(3, 8, 2, norm))
    net(random_images(4, 3, 32, 32, seed=3))  # running statistics, and the start of act
    w = {k.replace("layers", "main"): v for k, v in net.state_dict().items()}
    if place == "discriminator":
        content = {"model": {"x": torch.ones(2)}, "discriminator": w, "steps": 3}
    else:
        inside = {f"loss.discriminator.{k}": v for k, v in w.items()}
        content = {"state_dict": {"encoder.weight": torch.ones(2), **inside}}
    torch.save(content, tmp_path / "released.pt")
    found = PatchDiscriminator(3, 8, 2, norm)
    load_discriminator(found, tmp_path / "released.pt")
    x = random_images(2, 3, 32, 32)
    torch.testing.assert_close(found.eval()(x), patch_formula(w, x, norm))
    with pytest.raises(CheckpointError, match=r"'layers\.8\.weight' has shape .*expected"):
        load_discriminator(PatchDiscriminator(3, 8, 3, norm), tmp_path / "released.pt")


def test_act_norm_is_set_by_the_first_batch_alone():
    net = ActNorm(4)
    x = 3 * random_images(5, 4, 6, 6) + 1
    out = net(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(1), torch.ones(4), atol=1e-5, rtol=0)
    again = ActNorm(4)
    again.load_state_dict(net.state_dict())
    other = random_images(5, 4, 6, 6, seed=1)
    torch.testing.assert_close(again(other), net(other))


def maskbit_formula(w, x):
    x = F.leaky_relu(F.conv2d(x, w["block_in.0.weight"], w["block_in.0.bias"], padding=2), 0.1)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    for i in range(2):
        x = F.conv2d(x, w[f"blocks.{i}.0.weight"], w[f"blocks.{i}.0.bias"], padding=1)
        for axis in (2, 3):  # separable, one axis after the other
            kernel = taps.view(1, 1, -1, 1) if axis == 2 else taps.view(1, 1, 1, -1)
            stride, pad = ((2, 1), (1, 0)) if axis == 2 else ((1, 2), (0, 1))
            kernel = kernel.expand(x.shape[1], -1, -1, -1)
            x = F.conv2d(x, kernel, stride=stride, padding=pad, groups=x.shape[1])
        x = F.group_norm(x, 8, w[f"blocks.{i}.2.weight"], w[f"blocks.{i}.2.bias"])
        x = F.leaky_relu(x, 0.1)
    x = F.adaptive_max_pool2d(x, 4)
    x = F.leaky_relu(F.conv2d(x, w["to_logits.0.weight"], w["to_logits.0.bias"]), 0.1)
    return F.conv2d(x, w["to_logits.2.weight"], w["to_logits.2.bias"], padding=2)


def test_maskbit_against_its_formula():
    net = shaken(MaskBitDiscriminator(3, 8, 2, 4))
    net.blocks[1][2].num_groups = 8
    x = random_images(2, 3, 32, 24)
    expected = maskbit_formula(net.state_dict(), (x + 1) / 2)  # it sees pixels in [0, 1]
    torch.testing.assert_close(net(x), expected)


def stylegan_formula(w, x):
    x = F.leaky_relu(F.conv2d(x, w["blocks.0.weight"], w["blocks.0.bias"], padding=1), 0.2)
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    for i in (2, 3):
        own = {k: v for k, v in w.items() if k.startswith(f"blocks.{i}.")}

        def conv(x, name, own=own, i=i, **options):
            stem = f"blocks.{i}.{name}"
            return F.conv2d(x, own[f"{stem}.weight"], own[f"{stem}.bias"], **options)

        y = F.leaky_relu(conv(x, "net.0", padding=1), 0.2)
        y = F.leaky_relu(conv(y, "net.2", padding=1), 0.2)
        y = torch.stack([F.pad(c[:, None], (1, 1, 1, 1), "reflect") for c in y.unbind(1)], 1)
        y = y.squeeze(2)
        rows = sum(t * y[:, :, k : y.shape[2] - 2 + k] for k, t in enumerate(taps))
        y = sum(t * rows[..., k : rows.shape[3] - 2 + k] for k, t in enumerate(taps))
        y = conv(y, "downsample.1", stride=2, padding=1)
        x = (y + conv(x, "conv_res", stride=2)) / 2**0.5
    x = F.leaky_relu(F.conv2d(x, w["final_conv.0.weight"], w["final_conv.0.bias"], padding=1), 0.2)
    x = F.leaky_relu(x.flatten(1) @ w["final_linear.0.weight"].T + w["final_linear.0.bias"], 0.2)
    return x @ w["final_linear.2.weight"].T + w["final_linear.2.bias"]


def test_patch_discriminators_begin_as_published():
    """Convolutions of deviation 0.02, norms around 1 with the same."""
    torch.manual_seed(0)
    net = PatchDiscriminator(3, base_channels=32, norm="batch")
    for layer in net.layers:
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.5)


def test_stylegan_against_its_formula():
    net = shaken(StyleGANDiscriminator(16, base=64, most_channels=8))
    x = random_images(3, 3, 16, 16)
    torch.testing.assert_close(net(x), stylegan_formula(net.state_dict(), x))
    assert [net.blocks[i].conv_res.weight.shape[:2] for i in (2, 3)] == [(8, 4), (8, 8)]
    assert net.blocks[0].kernel_size == net.final_conv[0].kernel_size == (3, 3)
    wide = StyleGANDiscriminator([24, 40], base=64, most_channels=8, minibatch_group=2)
    assert wide(random_images(4, 3, 24, 40)).shape == (4, 1)


def test_minibatch_deviation_by_hand():
    x = random_images(6, 2, 3, 3)
    out = minibatch_deviation(x, 4)  # 3 is the largest divisor: images 0, 2, 4 and 1, 3, 5
    for first in (0, 1):
        group = x[first::2]
        expected = ((group - group.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        for number in range(first, 6, 2):
            torch.testing.assert_close(out[number], expected.expand(1, 3, 3))


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory):
    """Weights of timm's smallest ViT: 64 channels, 6 blocks."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    path = tmp_path_factory.mktemp("vit") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def dino(weights, **options):
    options = {"input_size": 160, "layers": [-1, 1, 5], "kernel_size": 3} | options
    return DinoDiscriminator("test_vit", str(weights), **options)


def test_dino_reads_the_layers_of_a_frozen_network(small_vit):
    net = dino(small_vit, spectral=False)
    x = random_images(2, 3, 160, 160)
    model = net.backbone.module.model
    seen = model.forward_intermediates(
        net.backbone.module.normalized(x), indices=[1, 5], return_prefix_tokens=True,
        norm=False, output_fmt="NLC", intermediates_only=True,
    )  # fmt: skip
    expected = [(tokens + prefix[:, :1]).transpose(1, 2) for tokens, prefix in seen]
    for ours, theirs in zip(net.backbone.module(x)[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    x.requires_grad_()
    logits = net(x)
    assert logits.shape == (2, 3 * 100)
    logits.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    assert not any("backbone" in name for name in net.state_dict())
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_released_heads_load(small_vit, tmp_path, norm):
    """By the names of torch's older spectral norm, whose weight is original / sigma."""
    net = shaken(dino(small_vit, norm=norm))
    published = {}
    for name, value in net.state_dict().items():
        for ours, theirs in (
            ("original", "weight_orig"),
            ("0._u", "weight_u"),
            ("0._v", "weight_v"),
        ):
            name = name.replace(f"parametrizations.weight.{ours}", theirs)
        published[name] = value
    assert "heads.0.1.fn.0.weight_u" in published
    torch.save({"discriminator": published}, tmp_path / "d.pt")
    found = dino(small_vit, norm=norm)
    load_discriminator(found, tmp_path / "d.pt")
    x = random_images(4, 3, 64, 64)
    torch.testing.assert_close(found.eval()(x), net.eval()(x))
    head, w = found.heads[0], published
    sigma = (
        w["heads.0.2.weight_u"] @ w["heads.0.2.weight_orig"].flatten(1) @ w["heads.0.2.weight_v"]
    )
    torch.testing.assert_close(head[2].weight, w["heads.0.2.weight_orig"] / sigma)
    if norm == "batch":  # over the whole batch of 4
        y = random_images(4, 64, 7)
        own = head[0][1]
        mean, var = y.mean((0, 2), keepdim=True), y.var((0, 2), correction=0, keepdim=True)
        expected = (y - mean) / (var + 1e-6).sqrt() * own.weight[:, None] + own.bias[:, None]
        torch.testing.assert_close(own(y), expected)


def test_taps_are_what_is_promised(small_vit):
    x = random_images(2, 3, 32, 32)
    for net in (
        PatchDiscriminator(3, 4, 2), MaskBitDiscriminator(3, 4, 2, 4),
        StyleGANDiscriminator(32, base=64, most_channels=8), dino(small_vit),
    ):  # fmt: skip
        taps = Taps(net.taps)
        net(x, taps)
        assert set(taps.features) == set(net.taps) and len(net.taps) > 2
        assert all(f.ndim == 3 and len(f) == 2 for f in taps.features.values())


# ---------------------------------------------------------------------- losses


def softplus(x):
    return math.log1p(math.exp(x))


def test_losses_are_closed_forms():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    forms = {
        "vanilla": (
            (softplus(-2) + softplus(1)) / 4 + (softplus(0.5) + softplus(-3)) / 4, 1.25),
        "non_saturating": (
            (softplus(-2) + softplus(1)) / 4 + (softplus(0.5) + softplus(-3)) / 4,
            (softplus(-0.5) + softplus(3)) / 2),
        "hinge_non_saturating": ((0 + 2) / 4 + (1.5 + 0) / 4, (softplus(-0.5) + softplus(3)) / 2),
        "hinge": ((0 + 2) / 4 + (1.5 + 0) / 4, 1.25),
        "hinge_non_saturating_mean": (
            (0 + 2) / 4 + (1.5 + 0) / 4, (softplus(-0.5) + softplus(3)) / 2),
        "least_squares": ((1 + 4) / 4 + (0.25 + 9) / 4, (0.25 + 16) / 4),
        "relativistic": ((softplus(-1.5) + softplus(-2)) / 2, (softplus(1.5) + softplus(2)) / 2),
    }  # fmt: skip
    assert forms.keys() == players.GAMES.keys()
    for name, (first, second) in forms.items():
        game = players.GAMES[name]
        assert float(game.discriminator(real, fake)) == pytest.approx(first, rel=1e-6), name
        assert float(game.generator(real, fake)) == pytest.approx(second, rel=1e-6), name


def test_softplus_of_an_images_mean_logit():
    fake = torch.tensor([[[[1.0, -4.0], [2.0, 3.0]]], [[[-1.0, 0.0], [0.0, -7.0]]]])
    found = players.GAMES["hinge_non_saturating_mean"].generator(None, fake)
    assert float(found) == pytest.approx((softplus(-0.5) + softplus(2)) / 2, rel=1e-6)


def test_gradient_penalty_of_a_quadratic():
    """D(x) = a |x|^2 / 2 has the gradient a x, and the penalty's gradient for a is 2 a |x|^2."""
    x = random_images(3, 2, 4, 4).requires_grad_()
    a = torch.tensor(0.7, requires_grad=True)
    penalty = players.gradient_penalty(a * x.square().flatten(1).sum(1) / 2, x)
    square = x.detach().square().flatten(1).sum(1).mean()
    assert float(penalty) == pytest.approx(0.49 * float(square), rel=1e-5)
    (slope,) = torch.autograd.grad(penalty, a)
    assert float(slope) == pytest.approx(1.4 * float(square), rel=1e-5)


def test_lecam_by_hand():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    found = players.lecam_penalty(real, fake, torch.tensor(1.0), torch.tensor(0.25))
    assert float(found) == pytest.approx(1.75**2 / 2 + (0.5**2 + 4**2) / 2)


# ---------------------------------------------------------------------- augmentation


def test_numbers_of_an_augmentation_belong_to_samples():
    aug, x = DiffAugment(probability=0.5), random_images(6, 3, 16, 16)

    def seen(first, last):
        with drawing(7, torch.arange(10 + first, 10 + last), 10):
            uniform((last - first, 3))
            return aug(x[first:last], aug.draw(x[first:last]))

    whole = seen(0, 6)
    torch.testing.assert_close(torch.cat([seen(0, 4), seen(4, 6)]), whole, rtol=0, atol=1e-6)
    assert sum(not torch.allclose(a, b) for a, b in zip(whole, x, strict=True)) >= 3


def test_augmentation_is_differentiable_and_each_part_does_what_it_says():
    x = random_images(2, 3, 16, 20).requires_grad_()
    numbers = torch.full((2, 13), 0.25)
    moved = DiffAugment(["translation"])(x, numbers)  # by floor(0.25 * 5) - 2 = -1 of 16 rows
    torch.testing.assert_close(moved[:, :, 1:, 1:], x[:, :, :-1, :-1])
    assert not moved[:, :, 0].any()
    cut = DiffAugment(["cutout"], cutout=0.5)(x, numbers)  # 8 rows from floor(0.25 * 17) - 4 = 0
    assert not cut[:, :, :8, :10].any() and torch.equal(cut[:, :, 8:], x[:, :, 8:])
    gray = numbers.clone()
    gray[:, 6] = 0  # saturation
    gray[:, 5], gray[:, 7] = 0.75, 0.5
    color = DiffAugment(["color"])(x, gray)
    torch.testing.assert_close(color, (x.mean(1, keepdim=True) + 0.25).expand_as(x))
    color.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    crop = DiffAugment([], crop_size=8, crop_share=1.0)(x, numbers)
    torch.testing.assert_close(crop, x[:, :, 2:10, 3:11])  # floor(0.25 * 9), floor(0.25 * 13)
    small = DiffAugment([], crop_size=8, crop_share=0.0)(x, numbers)
    torch.testing.assert_close(small, F.adaptive_avg_pool2d(x, 8))


def test_what_is_drawn_aside_moves_nothing():
    with drawing(1, torch.arange(3), 0):
        uniform((3, 2))
        with aside():
            uniform((3, 9))
        first = uniform((3, 2))
    with drawing(1, torch.arange(3), 0):
        uniform((3, 2))
        assert torch.equal(first, uniform((3, 2)))


# ---------------------------------------------------------------------- the adversary


def adversary(**options):
    torch.manual_seed(0)
    player = Adversary(PatchDiscriminator(3, 4, 2), OPTIONS, **options)  # type: ignore[arg-type]
    player.equip(build_optimizer)
    return player


def judged(player, images, pictures):
    """Gradients that both sides get in a step, and the numbers of the discriminator's."""
    leaf = pictures.clone().requires_grad_()
    loss = player(compared(leaf, images))
    loss.backward()
    numbers = player.learn(1.0, torch.enable_grad())
    grads = [p.grad.clone() for p in player.discriminator.parameters()]
    player.optimizer.zero_grad()
    return loss.detach(), leaf.grad, numbers, grads


@pytest.mark.parametrize("game", players.GAMES)
@pytest.mark.parametrize("extra", ["none", "features", "penalty", "lecam"])
def test_both_sides_against_autograd(game, extra):
    """One forward of each image serves both; the gradients are those of two."""
    images, pictures = random_images(4, 3, 16, 16), random_images(4, 3, 16, 16, seed=1)
    options = {
        "none": {},
        "features": {"feature_matching": 2.0},
        "penalty": {"penalty": {"r1": 3.0, "r2": 5.0, "interval": 2}},
        "lecam": {"lecam": {"weight": 0.5, "decay": 0.9, "per": "logit"}},
    }[extra]
    player = adversary(loss=game, **options)
    player.means = torch.tensor([0.3, -0.2])
    loss, slope, numbers, grads = judged(player, images, pictures)
    net = player.discriminator.requires_grad_(True)
    rules = players.GAMES[game]
    x = pictures.clone().requires_grad_()
    expected = rules.generator(net(images), net(x))
    if extra == "features":
        mine, real = Taps(net.taps), Taps(net.taps)
        net(x, mine), net(images, real)
        pairs = [(mine.features[n] - real.features[n].detach()).abs().mean() for n in net.taps]
        expected = expected + 2 * sum(pairs) / len(pairs)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected, x)[0])
    y = images.clone().requires_grad_()
    real, fake = net(y), net(x)
    total = rules.discriminator(real, fake)
    torch.testing.assert_close(numbers["discriminator"], total.detach())
    if extra == "penalty":  # every second step, twice
        total = total + 2 * 1.5 * players.gradient_penalty(real, y)
        total = total + 2 * 2.5 * players.gradient_penalty(fake, x)
    if extra == "lecam":
        total = total + 0.5 * players.lecam_penalty(real, fake, *player.means)
    for found, other in zip(grads, torch.autograd.grad(total, list(net.parameters())), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)


def test_each_image_is_judged_once(monkeypatch):
    player, seen = adversary(), []
    real = PatchDiscriminator.forward
    monkeypatch.setattr(
        PatchDiscriminator, "forward", lambda s, x, *a: seen.append(len(x)) or real(s, x, *a)
    )
    judged(player, random_images(4, 3, 16, 16), random_images(4, 3, 16, 16, seed=1))
    assert seen == [4, 4]


def test_lecams_means_move_once_per_step_and_survive(tmp_path):
    player = adversary(lecam={"weight": 0.1, "decay": 0.75, "per": "batch"})
    images, pictures = random_images(4, 3, 16, 16), random_images(4, 3, 16, 16, seed=1)
    logits = [player.discriminator(x).mean().item() for x in (images, pictures)]
    for half in (slice(0, 2), slice(2, 4)):
        player.watch(compared(pictures[half], images[half]))
        player.learn(0.5, torch.enable_grad())
        assert not player.means.any()
    player.step(1.0)
    assert player.means.tolist() == pytest.approx([0.25 * x for x in logits], rel=1e-5)
    other = adversary(lecam={"weight": 0.1, "decay": 0.75, "per": "batch"})
    other.load_state_dict(player.state_dict())
    assert torch.equal(other.means, player.means) and other.steps == 1
    old = {k: v for k, v in player.state_dict().items() if k in ("discriminator", "optimizer")}
    other.load_state_dict(old)  # of before there were means
    assert other.steps == 0


def test_discarding_a_step_leaves_no_trace():
    player = adversary(lecam={"weight": 0.1, "decay": 0.75, "per": "logit"})
    player.watch(compared(random_images(2, 3, 16, 16), random_images(2, 3, 16, 16)))
    player.learn(1.0, torch.enable_grad())
    player.discard()
    before = {k: v.clone() for k, v in player.discriminator.state_dict().items()}
    player.step(1.0)  # nothing to do
    assert all(torch.equal(v, before[k]) for k, v in player.discriminator.state_dict().items())
    assert player.steps == 0 and not player.means.any()


# ---------------------------------------------------------------------- weights


def test_a_carried_loss_is_the_loss():
    value = random_images(2, 5).requires_grad_()
    leaf = leaf_of(value * 2)
    loss, gradient = carried((leaf.square() * torch.arange(5)).sum(), leaf, value * 2)
    (3 * loss).backward()
    torch.testing.assert_close(value.grad, 3 * 8 * value.detach() * torch.arange(5))
    torch.testing.assert_close(gradient, 2 * leaf.detach() * torch.arange(5))


def test_adaptive_scale_of_a_linear_layer():
    w = torch.tensor([[1.0, 2.0]], requires_grad=True)
    x = torch.tensor([3.0, 4.0])
    y = (w @ x).sum()
    found = adaptive_scale(2 * y, 0.25 * y, w)  # norms 10 and 1.25
    assert float(found) == pytest.approx(10 / (1.25 + 1e-4), rel=1e-6)
    assert float(adaptive_scale(y, 0 * y, w)) == 1e4  # its bound


def test_picture_scale_by_hand():
    others, own = random_images(2, 5), random_images(2, 5) * 1e-9
    expected = (others.double().norm() / (own.double().norm() + 1e-12)).item()
    assert float(picture_scale(others, own)) == 1e4  # its bound
    assert float(picture_scale(1e-8 * others, own)) == pytest.approx(1e-8 * expected, rel=1e-5)
    assert float(picture_scale(0 * others, own)) == 0


def adaptive_config(*more):
    return config_of(
        *TINY, "adversary=patch", "loss.terms.adversarial.discriminator.base_channels=4",
        "loss.terms.adversarial.discriminator.num_layers=2", "loss.terms.adversarial.start=0",
        "loss.terms.adversarial.ramp=0", "loss.terms.adversarial.adaptive=true",
        "loss.terms.adversarial.weight=0.8", *more,
    )  # fmt: skip


def test_an_adaptive_weight_against_autograd_by_hand():
    torch.manual_seed(0)
    config = adaptive_config()
    tokenizer = build_tokenizer(config)
    objective = build_objective(config["loss"], tokenizer)
    objective.equip(build_optimizer)
    images = random_images(3, 3, 16, 16)
    output = tokenizer(images)
    losses = objective(Step(images, output, tokenizer))
    losses["total"].backward(retain_graph=True)
    layer = tokenizer.decoder.last_layer
    found = {n: p.grad.clone() for n, p in tokenizer.named_parameters() if p.grad is not None}
    tokenizer.zero_grad()
    picture = output.predictions["image"].value
    pixels = F.mse_loss(picture, images)
    verdict = -objective.players["adversarial"].discriminator(picture).mean()
    first, second = (
        torch.autograd.grad(x, layer, retain_graph=True)[0].norm() for x in (pixels, verdict)
    )
    scale = 0.8 * first / (second + 1e-4)
    assert objective.notes["weight/adversarial"].item() == pytest.approx(scale.item(), rel=1e-4)
    total = pixels + scale.detach() * verdict
    for name, loss in output.quantizer.losses.items():
        total = total + tokenizer.quantizer.loss_weights[name] * loss
    torch.testing.assert_close(losses["total"], total)
    total.backward()
    for name, p in tokenizer.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():  # nobody learns, and nothing breaks
        objective(Step(images, tokenizer(images), tokenizer))


def test_a_weight_that_follows_gradients_at_the_picture():
    config = adaptive_config("loss.terms.adversarial.adaptive=picture")
    config["loss"]["terms"]["more"] = {"_target_": "l1", "weight": 0.5}
    tokenizer = build_tokenizer(config)
    objective = build_objective(config["loss"], tokenizer)
    objective.equip(build_optimizer)
    images = random_images(3, 3, 16, 16)
    output = tokenizer(images)
    losses = objective(Step(images, output, tokenizer))
    picture = output.predictions["image"].value
    pixels = F.mse_loss(picture, images) + 0.5 * F.l1_loss(picture, images)
    verdict = -objective.players["adversarial"].discriminator(picture).mean()
    first, second = (
        torch.autograd.grad(x, picture, retain_graph=True)[0].norm() for x in (pixels, verdict)
    )
    weight = 0.8 * first / second
    assert objective.notes["weight/adversarial"].item() == pytest.approx(weight.item(), rel=1e-4)
    total = pixels + weight.detach() * verdict
    for name, loss in output.quantizer.losses.items():
        total = total + tokenizer.quantizer.loss_weights[name] * loss
    torch.testing.assert_close(losses["total"], total)
    names, parameters = zip(*tokenizer.named_parameters(), strict=True)
    one, two = (
        torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True)
        for x in (losses["total"], total)
    )
    for name, found, expected in zip(names, one, two, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=name)


def test_gradients_of_terms_are_measured_aside():
    config = adaptive_config()
    tokenizer = build_tokenizer(config)
    objective = build_objective(config["loss"], tokenizer)
    objective.equip(build_optimizer)
    images = random_images(3, 3, 16, 16)
    output = tokenizer(images)
    plain = objective(Step(images, output, tokenizer))["total"]
    assert not any(name.startswith("gradient/") for name in objective.notes)
    objective.measuring = True
    assert torch.equal(objective(Step(images, output, tokenizer))["total"], plain)
    picture = output.predictions["image"].value.detach()
    expected = (2 * (picture - images) / picture.numel()).norm().item()
    assert objective.notes["gradient/reconstruction"].item() == pytest.approx(expected, rel=1e-5)
    assert objective.notes["gradient/adversarial"] > 0


def test_misfits_of_an_adaptive_weight(fails):
    config = adaptive_config()
    tokenizer = build_tokenizer(config)
    tokenizer.decoder.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"adversarial\.adaptive=true: .*one that is frozen"):
        build_objective(config["loss"], tokenizer)
    config = adaptive_config("loss.terms.adversarial.adaptive=picture")
    build_objective(config["loss"], tokenizer)  # reads no last layer
    config["loss"]["terms"]["reconstruction"] = None
    with pytest.raises(ConfigError, match=r"adaptive=picture: no other term compares image"):
        build_objective(config["loss"], tokenizer)


def test_shares_become_samples_of_the_run():
    entry = Entry(1.0, start=0.3, ramp=0.1).resolved(1000)
    assert (entry.start_samples, entry.ramp_samples, entry.start, entry.ramp) == (300, 100, 0, 0)
    assert [entry.weight_at(n) for n in (299, 300, 350, 400)] == [0, 0, 0.5, 1]
    given = Entry(1.0, start_samples=7, start=0.3, ramp=0.1).resolved(1000)
    assert (given.start_samples, given.ramp_samples) == (7, 100)  # samples hold
