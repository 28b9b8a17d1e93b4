"""Losses against closed forms, and the rule that no loss is dropped in silence."""

import math
import re
from dataclasses import replace

import pytest
import torch

from helpers import CONFIGS, compared, config_of, needs_hed, needs_lite0
from vistok.core.errors import ConfigError
from vistok.core.outputs import Prediction
from vistok.losses import pixels as reconstruction
from vistok.losses.features import CosineLoss
from vistok.losses.objective import build_objective
from vistok.losses.pixels import GradientLoss, L1Loss, LogMSELoss, MSELoss


def test_closed_forms():
    target = torch.zeros(2, 3, 4, 4)
    prediction = torch.zeros_like(target)
    prediction[0] = 0.5
    prediction[1, :, :, :2] = -1.0
    o = compared(prediction, target)
    assert MSELoss()(o).item() == pytest.approx((0.25 + 0.5) / 2)
    assert L1Loss()(o).item() == pytest.approx((0.5 + 0.5) / 2)
    expected = (math.log(0.25 + 1e-4) + math.log(0.5 + 1e-4)) / 2
    assert LogMSELoss()(o).item() == pytest.approx(expected, rel=1e-6)
    assert LogMSELoss(0.5)(o).item() == pytest.approx((math.log(0.75) + math.log(1.0)) / 2)


@pytest.mark.parametrize("loss", [MSELoss(), L1Loss(), LogMSELoss()])
def test_losses_compute_in_float32_and_give_gradients(loss):
    prediction = torch.full((1, 3, 4, 4), 0.3, dtype=torch.bfloat16, requires_grad=True)
    value = loss(compared(prediction, torch.zeros(1, 3, 4, 4)))
    assert value.dtype == torch.float32 and value.ndim == 0
    value.backward()
    assert prediction.grad is not None and (prediction.grad > 0).all()


def test_cosines_are_those_of_places_whatever_the_length():
    """Angles of 0, 60 and 180 degrees; the second sample counts three times."""
    turned = [[1.0, 0.0], [0.5, 0.75**0.5], [-1.0, 0.0]]
    value = torch.tensor([turned[:2], turned[1:]], dtype=torch.bfloat16, requires_grad=True)
    target = torch.tensor([7.0, 0.0]).expand(2, 2, 2)
    step = compared(value, target, kind="features", of="semantic")
    loss = CosineLoss()(step)
    assert loss.item() == pytest.approx((0 + 0.5 + 0.5 + 2) / 4, rel=1e-2)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    loss.backward()
    assert value.grad is not None and value.grad[0, 1].any() and torch.isfinite(value.grad).all()
    weighted = Prediction(value, target, "features", torch.tensor([1.0, 3.0]))
    step = replace(step, output=replace(step.output, predictions={"semantic": weighted}))
    assert CosineLoss()(step).item() == pytest.approx((0.25 + 3 * 1.25) / 4, rel=1e-2)


def test_psnr_loss_moves_as_psnr_does():
    target = torch.rand(3, 3, 8, 8) * 2 - 1
    small, large = target + 0.1, target + 0.2
    difference = LogMSELoss(0.0)(compared(large, target)) - LogMSELoss(0.0)(compared(small, target))
    assert 10 / math.log(10) * difference.item() == pytest.approx(
        20 * math.log10(2), rel=1e-4
    )  # dB


def test_the_log_of_a_batch_weighs_steps_alike_and_images_as_the_mse_does():
    target = torch.zeros(2, 3, 4, 4)
    for scale in (1.0, 10.0):
        prediction = (scale * torch.tensor([0.1, 0.3])).view(2, 1, 1, 1).expand(2, 3, 4, 4)
        prediction = prediction.clone().requires_grad_()
        value = LogMSELoss(0.0, per="batch")(compared(prediction, target))
        assert value.item() == pytest.approx(math.log(scale**2 * 0.05), rel=1e-5)
        value.backward()
        assert prediction.grad is not None
        # 2 x / (M mean x^2): by the image's error, as of the MSE, and whole by 1 / scale.
        expected = 2 * prediction.detach() / (prediction.numel() * scale**2 * 0.05)
        assert torch.allclose(prediction.grad, expected, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"per=image"):
        LogMSELoss(per="image")


def test_the_log_of_a_batch_is_that_of_all_ranks(monkeypatch):
    """The mean over ranks of their gradients is the gradient of the log of the mean error."""
    whole = torch.tensor([[0.1, 0.3], [0.5, 0.9]]).requires_grad_()
    target = torch.zeros(4, 1, 1, 1)
    LogMSELoss(0.0, per="batch")(compared(whole.view(4, 1, 1, 1), target)).backward()
    parts = [whole.detach()[rank].clone().requires_grad_() for rank in range(2)]
    other = {0: parts[1].detach().square().mean(), 1: parts[0].detach().square().mean()}
    for rank, part in enumerate(parts):
        # What all-reduce's backward pass does: it sums the ranks' slopes, and each is 1/2 here.
        reduced = lambda mine, rank=rank: mine + ((other[rank] - mine.detach()) / 2)  # noqa: E731
        monkeypatch.setattr(reconstruction, "all_reduce_mean_with_grad", reduced)
        LogMSELoss(0.0, per="batch")(compared(part.view(2, 1, 1, 1), target[:2])).backward()
    assert whole.grad is not None
    averaged = torch.stack([part.grad / 2 for part in parts if part.grad is not None])
    assert torch.allclose(averaged, whole.grad, rtol=1e-5)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 3.0])])
def test_gradients_against_a_loop_over_pixels(weight):
    a, b = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    wrong = (a - b).double()
    images = []
    for image in wrong:
        down = [(p[y + 1, x] - p[y, x]) ** 2 for p in image for y in range(3) for x in range(5)]
        right = [(p[y, x + 1] - p[y, x]) ** 2 for p in image for y in range(4) for x in range(4)]
        images.append(sum(down) / len(down) + sum(right) / len(right))
    each = torch.stack(images)
    expected = each.mean() if weight is None else (each * weight).sum() / weight.sum()
    step = compared(a, b)
    step.output.predictions["image"] = Prediction(a, b, "pixels", weight)
    assert GradientLoss()(step).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_constant_offset_has_no_gradients_and_a_seam_has():
    target = torch.zeros(1, 3, 8, 16)
    value = target.clone()
    value[..., 8:] = 0.5  # one seam: of 15 differences along a row
    assert GradientLoss()(compared(target + 0.3, target)).item() == pytest.approx(0, abs=1e-12)
    assert GradientLoss()(compared(value, target)).item() == pytest.approx(0.25 / 15)


class OneHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = {"image": "pixels"}


class Fake(torch.nn.Module):
    """As much of a tokenizer as an objective reads."""

    def __init__(self, channels=3, image_size=(32, 32), whole=False, **weights):
        super().__init__()
        self.whole = whole
        self.channels, self.image_size = channels, image_size
        self.quantizer, self.decoder = torch.nn.Module(), OneHead()
        self.quantizer.loss_weights = weights

    @property
    def heads(self):
        return self.decoder.heads | ({"whole_image": "pixels"} if self.whole else {})

    def tap_shapes(self):
        return {}


def objective(terms, **weights):
    return build_objective({"terms": terms}, Fake(**weights))


MSE = {"_target_": "mse", "weight": 2.0}


def test_the_objective_sums_terms_and_the_quantizers_own():
    made = objective(
        {"a": MSE, "b": {"_target_": "l1", "weight": 0.5}, "c": None},
        commitment=0.25,
        entropy=0.1,
        unused=9.0,
    )
    step = compared(
        torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2), commitment=4.0, entropy=-1.0
    )
    assert {k: v.item() for k, v in made(step).items()} == pytest.approx(
        {"a": 9, "b": 3, "commitment": 4, "entropy": -1, "total": 18 + 1.5 + 1 - 0.1}
    )


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"a": {"_target_": "mse"}}, r"^loss\.terms\.a\.weight is missing"),
        ({"a": {**MSE, "weight": -1}}, r"^loss\.terms\.a\.weight=-1"),
        ({"a": {**MSE, "weight": "x"}}, r"^loss\.terms\.a\.weight=x"),
        ({"a": {**MSE, "start_samples": 0.5}}, r"^loss\.terms\.a\.start_samples=0\.5"),
        ({"a": {**MSE, "of": "imag"}}, r"^loss\.terms\.a\.of=imag: .*did you mean 'image'"),
        ({"a": {**MSE, "typo": 1}}, "typo"),
        (
            {"a": {"weight": 1}},
            r"^loss\.terms\.a: has weight but no _target_.*set loss\.terms\.a=null",
        ),
        ({"a": 3}, r"^loss\.terms\.a=3: expected a mapping with a _target_"),
        ({"a": {"_target_": "codes", "weight": 1}}, r"^loss\.terms\.a: CodeLoss compares logits"),
        ({"commitment": MSE}, r"^loss\.terms\.commitment: the quantizer has a loss of that name"),
        (
            {"entropy": {"_target_": "quantizer_loss"}},
            r"^loss\.terms\.entropy: .*it has: commitment",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_the_run_is_built(terms, words):
    with pytest.raises(ConfigError, match=words):
        objective(terms, commitment=0.25)


def test_a_quantizers_loss_without_a_weight_is_an_error():
    with pytest.raises(ConfigError, match="'commitment' has no weight"):
        objective({"a": MSE})(compared(torch.ones(1), torch.zeros(1), commitment=1.0))


def test_starts_and_ramps_read_samples():
    ramp = {**MSE, "start_samples": 100, "ramp_samples": 50}
    own = {"_target_": "quantizer_loss", "weight": 3.0, "start_samples": 120}
    made = objective({"a": ramp, "commitment": own}, commitment=0.25)
    step = compared(torch.full((2,), 2.0), torch.zeros(2), commitment=1.0)
    totals = {
        seen: made(replace(step, samples_seen=seen))["total"].item()
        for seen in (0, 99, 100, 125, 150, 1000)
    }
    assert totals == pytest.approx({0: 0, 99: 0, 100: 0, 125: 4 + 3, 150: 8 + 3, 1000: 8 + 3})


def test_samples_count_by_their_weight():
    value, target = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    prediction = Prediction(value, target, "pixels", torch.tensor([3.0, 1.0]))
    step = compared(value, target)
    weighted = replace(step, output=replace(step.output, predictions={"image": prediction}))
    assert MSELoss()(weighted).item() == pytest.approx((3 * 1 + 1 * 9) / 4)
    assert L1Loss()(weighted).item() == pytest.approx((3 * 1 + 1 * 3) / 4)


NEEDS = {"mse_features": needs_lite0} | dict.fromkeys(
    ("mse_hed_vgg", "mse_gram", "log_mse_whole_hed_vgg"), needs_hed
)
PIXEL_LOSSES = sorted(
    {p.stem for p in (CONFIGS / "loss").glob("[!_]*.yaml")} - {"proxy_codes", "mse_prior"}
)
# Of networks whose weights are not in packages, and of another head; test_perceptual.py has them.
PIXEL_LOSSES = [
    n
    for n in PIXEL_LOSSES
    if not re.search("lpips|vnext|resnet|hita|mask(bit|git)|laplace|_vit|vit_", n)
]
PIXEL_LOSSES = [pytest.param(n, marks=NEEDS[n]) if n in NEEDS else n for n in PIXEL_LOSSES]


@pytest.mark.parametrize("name", PIXEL_LOSSES)
def test_every_loss_config_builds_and_is_zero_or_least_at_the_target(name):
    made = build_objective(config_of(f"loss={name}")["loss"], Fake(whole="whole" in name))
    target = torch.rand(2, 3, 32, 32) * 2 - 1
    totals = []
    for offset in (0.0, 0.1, 0.3):
        step = compared(target + offset, target)
        step.output.predictions["whole_image"] = step.prediction
        totals.append(made(step)["total"])
    assert totals[0] < totals[1] < totals[2]


def test_proxy_codes_are_a_cross_entropy():
    fake = Fake()
    fake.decoder.heads = {"codes": "logits"}
    made = build_objective(config_of("loss=proxy_codes")["loss"], fake)
    logits, codes = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = torch.logsumexp(logits, -1) - logits.gather(-1, codes[..., None])[..., 0]
    total = made(compared(logits, codes, kind="logits", of="codes"))["total"]
    torch.testing.assert_close(total, expected.mean())
