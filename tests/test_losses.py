"""Losses against closed forms, and the rule that no loss is dropped in silence."""

import math

import pytest
import torch

from helpers import CONFIGS, config_of, needs_lite0
from vistok.core.errors import ConfigError
from vistok.core.outputs import QuantizerOutput, TokenizerOutput
from vistok.losses import pixels as reconstruction
from vistok.losses.objective import CompositeLoss
from vistok.losses.pixels import L1Loss, LogMSELoss, MSELoss
from vistok.tasks.reconstruction import build_loss


def output(prediction, target, **losses):
    scalars = {name: torch.tensor(value) for name, value in losses.items()}
    quantizer = QuantizerOutput(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).long(), scalars)
    return TokenizerOutput(prediction, target, quantizer)


def test_closed_forms():
    target = torch.zeros(2, 3, 4, 4)
    prediction = torch.zeros_like(target)
    prediction[0] = 0.5
    prediction[1, :, :, :2] = -1.0
    o = output(prediction, target)
    assert MSELoss()(o, 0).item() == pytest.approx((0.25 + 0.5) / 2)
    assert L1Loss()(o, 0).item() == pytest.approx((0.5 + 0.5) / 2)
    expected = (math.log(0.25 + 1e-4) + math.log(0.5 + 1e-4)) / 2
    assert LogMSELoss()(o, 0).item() == pytest.approx(expected, rel=1e-6)
    assert LogMSELoss(0.5)(o, 0).item() == pytest.approx((math.log(0.75) + math.log(1.0)) / 2)


@pytest.mark.parametrize("loss", [MSELoss(), L1Loss(), LogMSELoss()])
def test_losses_compute_in_float32_and_give_gradients(loss):
    prediction = torch.full((1, 3, 4, 4), 0.3, dtype=torch.bfloat16, requires_grad=True)
    value = loss(output(prediction, torch.zeros(1, 3, 4, 4)), 0)
    assert value.dtype == torch.float32 and value.ndim == 0
    value.backward()
    assert prediction.grad is not None and (prediction.grad > 0).all()


def test_psnr_loss_moves_as_psnr_does():
    target = torch.rand(3, 3, 8, 8) * 2 - 1
    small, large = target + 0.1, target + 0.2
    difference = LogMSELoss(0.0)(output(large, target), 0) - LogMSELoss(0.0)(
        output(small, target), 0
    )
    assert 10 / math.log(10) * difference.item() == pytest.approx(
        20 * math.log10(2), rel=1e-4
    )  # dB


def test_the_log_of_a_batch_weighs_steps_alike_and_images_as_the_mse_does():
    target = torch.zeros(2, 3, 4, 4)
    for scale in (1.0, 10.0):
        prediction = (scale * torch.tensor([0.1, 0.3])).view(2, 1, 1, 1).expand(2, 3, 4, 4)
        prediction = prediction.clone().requires_grad_()
        value = LogMSELoss(0.0, per="batch")(output(prediction, target), 0)
        assert value.item() == pytest.approx(math.log(scale**2 * 0.05), rel=1e-5)
        value.backward()
        assert prediction.grad is not None
        # 2 x / (M mean x^2): by the image's error, as of the MSE, and whole by 1 / scale.
        expected = 2 * prediction.detach() / (prediction.numel() * scale**2 * 0.05)
        assert torch.allclose(prediction.grad, expected, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"loss\.terms\.reconstruction\.per=image"):
        LogMSELoss(per="image")


def test_the_log_of_a_batch_is_that_of_all_ranks(monkeypatch):
    """The mean over ranks of their gradients is the gradient of the log of the mean error."""
    whole = torch.tensor([[0.1, 0.3], [0.5, 0.9]]).requires_grad_()
    target = torch.zeros(4, 1, 1, 1)
    LogMSELoss(0.0, per="batch")(output(whole.view(4, 1, 1, 1), target), 0).backward()
    parts = [whole.detach()[rank].clone().requires_grad_() for rank in range(2)]
    other = {0: parts[1].detach().square().mean(), 1: parts[0].detach().square().mean()}
    for rank, part in enumerate(parts):
        # What all-reduce's backward pass does: it sums the ranks' slopes, and each is 1/2 here.
        reduced = lambda mine, rank=rank: mine + ((other[rank] - mine.detach()) / 2)  # noqa: E731
        monkeypatch.setattr(reconstruction, "all_reduce_mean_with_grad", reduced)
        LogMSELoss(0.0, per="batch")(output(part.view(2, 1, 1, 1), target[:2]), 0).backward()
    assert whole.grad is not None
    averaged = torch.stack([part.grad / 2 for part in parts if part.grad is not None])
    assert torch.allclose(averaged, whole.grad, rtol=1e-5)


def test_composite_sums_terms_and_the_quantizers_own():
    loss = CompositeLoss({"a": MSELoss(), "b": L1Loss()}, {"a": 2, "b": 0.5})
    o = output(torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2), commitment=4.0, entropy=-1.0)
    terms = loss(o, {"commitment": 0.25, "entropy": 0.1, "unused": 9.0}, step=0)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        {"a": 9, "b": 3, "commitment": 4, "entropy": -1, "total": 18 + 1.5 + 1 - 0.1}
    )


def test_composite_refuses_a_loss_without_weight():
    loss = CompositeLoss({"a": MSELoss()}, {"a": 1})
    o = output(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), commitment=1.0)
    with pytest.raises(ConfigError, match="'commitment' has no weight"):
        loss(o, {}, 0)
    for terms, weights in (({"a": MSELoss()}, {}), ({"a": MSELoss()}, {"a": 1, "b": 1})):
        with pytest.raises(ConfigError, match=r"loss\.weights.*check [ab]"):
            CompositeLoss(terms, weights)
    with pytest.raises(ConfigError, match=r"loss\.terms\.commitment"):
        CompositeLoss({"commitment": MSELoss()}, {"commitment": 1})(o, {"commitment": 1}, 0)


def test_composite_passes_the_step():
    class Ramp(torch.nn.Module):
        def forward(self, output, step):
            return output.prediction.mean() * step

    loss = CompositeLoss({"ramp": Ramp()}, {"ramp": 1})
    o = output(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert [loss(o, {}, step)["total"].item() for step in (0, 7)] == [0, 7]


PIXEL_LOSSES = sorted({p.stem for p in (CONFIGS / "loss").glob("*.yaml")} - {"proxy_codes"})
PIXEL_LOSSES = [
    pytest.param(n, marks=needs_lite0) if n == "mse_features" else n for n in PIXEL_LOSSES
]


@pytest.mark.parametrize("name", PIXEL_LOSSES)
def test_every_loss_config_builds_and_is_zero_or_least_at_the_target(name):
    loss = build_loss(config_of(f"loss={name}")["loss"])
    target = torch.rand(2, 3, 8, 8) * 2 - 1
    exact = loss(output(target.clone(), target), {}, 0)["total"]
    near, far = (loss(output(target + d, target), {}, 0)["total"] for d in (0.1, 0.3))
    assert exact < near < far


def test_proxy_codes_are_a_cross_entropy():
    loss = build_loss(config_of("loss=proxy_codes")["loss"])
    logits, codes = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = torch.logsumexp(logits, -1) - logits.gather(-1, codes[..., None])[..., 0]
    total = loss(output(logits, codes), {}, 0)["total"]
    torch.testing.assert_close(total, expected.mean())
