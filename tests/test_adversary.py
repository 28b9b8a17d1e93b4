"""Two optimizers: a discriminator next to the tokenizer, against a loop by hand and on two ranks."""

import json

import pytest
import torch
import torch.nn.functional as F

from helpers import SIZES, TINY, config_of, losses_of
from ranks import TWO, assert_ended, fork
from same_runs import assert_same, assert_same_training, state_of
from test_distributed_training import floats
from vistok.cli import train
from vistok.core.registry import build
from vistok.data.datamodule import VistokDataModule
from vistok.losses.gan.discriminators import PatchDiscriminator
from vistok.losses.gan.players import hinge_discriminator_loss, hinge_generator_loss
from vistok.losses.objective import build_objective
from vistok.models.build import build_tokenizer
from vistok.models.term import Step
from vistok.tasks.reconstruction import Reconstruction
from vistok.training.optimizers import build_optimizer, parameter_groups

TERM = "loss.terms.adversarial"
ADVERSARY = [
    "adversary=patch",
    f"{TERM}.start=0",
    f"{TERM}.ramp=0",
    f"{TERM}.warmup=0",
    f"{TERM}.discriminator.base_channels=4",
    f"{TERM}.discriminator.num_layers=2",
    f"{TERM}.weight=0.3",
    f"{TERM}.adaptive=false",
    f"{TERM}.optimizer.lr=3e-3",
    f"{TERM}.optimizer.weight_decay=0.1",
    f"{TERM}.gradient_clip_val=0.2",
]


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [
        *TINY,
        *ADVERSARY,
        "data=folder",
        f"data.train={photos}",
        "data.image_size=16",
        "data.val_fraction=0.3",
        "trainer.max_steps=6",
        "trainer.val_check_interval=3",
        "callbacks.checkpoint_every=2",
        "optimizer.total_samples=24",
        "quantizer.dead_code_threshold=0",
    ]


@pytest.fixture
def starts(monkeypatch):
    """The states that runs begin with; of the logits some lie beyond the hinges."""
    kept = []

    def keep(self):
        if self.objective.players:
            discriminator = self.objective.players["adversarial"].discriminator
            if self.trainer.global_step == 0:
                discriminator.layers[-1].weight.data *= 4
            kept.append([copied(self.tokenizer.state_dict()), copied(discriminator.state_dict())])

    monkeypatch.setattr(Reconstruction, "on_train_start", keep, raising=False)
    return kept


def copied(state):
    return {key: value.clone() for key, value in state.items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------- the players


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25])
    assert hinge_discriminator_loss(real, fake) == pytest.approx((2.5 / 3 + 1.25 / 2) / 2)
    assert hinge_generator_loss(fake) == pytest.approx(2.75 / 2)


@pytest.mark.parametrize(("size", "layers", "side"), [(64, 3, 6), (16, 2, 2), (256, 3, 30)])
def test_logits_of_patches(size, layers, side):
    net = PatchDiscriminator(base_channels=2, num_layers=layers)
    images = torch.randn(2, 3, size, size)
    assert net(images).shape == (2, 1, side, side)
    torch.testing.assert_close(net(images)[:1], net(images[:1]))  # an image for itself


def test_each_loss_moves_its_own_player():
    torch.manual_seed(0)
    config = config_of(*TINY, *ADVERSARY)
    tokenizer = build_tokenizer(config)
    adversary = build_objective(config["loss"], tokenizer).players["adversarial"]
    adversary.equip(build_optimizer)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = tokenizer(images)
    step = Step(images, output, tokenizer)
    adversary(step).backward()
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    assert all(p.grad is not None for p in tokenizer.decoder.parameters() if p.requires_grad)
    tokenizer.zero_grad()
    before = copied(adversary.discriminator.state_dict())
    for share in (0.25, 0.75):
        adversary.watch(step)
        adversary.learn(share, torch.enable_grad())
    assert not adversary.learn(1.0, torch.enable_grad())  # nothing is kept
    assert all(p.grad is None for p in tokenizer.parameters())
    found = [p.grad.clone() for p in adversary.discriminator.parameters()]
    again = adversary.discriminator.requires_grad_(True)
    again.zero_grad()
    hinge_discriminator_loss(
        again(images), again(output.predictions["image"].value.detach())
    ).backward()
    for grad, p in zip(found, again.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)
    assert same(before, again.state_dict())
    adversary.step(1.0)
    assert not any(torch.equal(before[k], v) for k, v in again.state_dict().items() if v.ndim > 1)
    assert all(p.grad is None for p in again.parameters())


# ---------------------------------------------------------------------- whole runs


def test_a_run_is_the_loop_by_hand(words, tmp_path, starts):
    assert train([*words, "hydra.run.dir=run"]) == 0
    config = config_of(*words)
    options = config["loss"]["terms"]["adversarial"]
    tokenizer, discriminator = build_tokenizer(config), build(options["discriminator"])
    tokenizer.load_state_dict(starts[0][0])
    discriminator.load_state_dict(starts[0][1])
    data = VistokDataModule(**config["data"])
    data.setup("fit")
    first = torch.optim.AdamW(
        parameter_groups(tokenizer, config["optimizer"]["weight_decay"]),
        betas=config["optimizer"]["betas"],
    )
    second = torch.optim.AdamW(
        parameter_groups(discriminator, 0.1), betas=options["optimizer"]["betas"]
    )
    expected: dict[str, list[float]] = {"total": [], "adversarial": [], "discriminator": []}
    lr = floats(tmp_path / "run", "lr")
    for step, batch in zip(range(1, 7), data.train_dataloader(), strict=False):
        images = batch["image"].float() / 127.5 - 1
        output = tokenizer(images)
        verdict = -discriminator(output.predictions["image"].value).mean()
        total = F.mse_loss(output.predictions["image"].value, images) + 0.3 * verdict
        for name, loss in output.quantizer.losses.items():
            total = total + tokenizer.quantizer.loss_weights[name] * loss
        pictures = output.predictions["image"].value.detach()
        real, fake = discriminator(images), discriminator(pictures)
        judged = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
        players = [
            (total, [p for p in tokenizer.parameters() if p.requires_grad], first, 1.0, 1e-3),
            (judged, list(discriminator.parameters()), second, 0.2, 3e-3),
        ]
        # Both gradients are taken before either moves.
        grads = [torch.autograd.grad(loss, own, allow_unused=True) for loss, own, *_ in players]
        # Of one that is 0 but for rounding, Adam would make a first step of chance.
        assert step > 1 or all(grad.abs().max() > 1e-4 for grad in grads[1])
        for (_, own, optimizer, largest, base), found in zip(players, grads, strict=True):
            for parameter, grad in zip(own, found, strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(own, largest)
            for group in optimizer.param_groups:
                group["lr"] = base * lr[step] / 1e-3
            optimizer.step()
        tokenizer.quantizer.after_step([first])
        for name, loss in (("total", total), ("adversarial", verdict), ("discriminator", judged)):
            expected[name].append(float(loss.detach()))
    for name, values in expected.items():
        found = list(floats(tmp_path / "run", f"loss/{name}").values())
        assert found == pytest.approx(values, rel=3e-4, abs=1e-5), name
    state = state_of(tmp_path / "run")
    for key, value in discriminator.state_dict().items():
        found = state["players"]["adversarial"]["discriminator"][key]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=3e-4)  # six steps move it by 1e-2
    assert state["global_step"] == 6  # the tokenizer's steps alone


def test_it_waits_for_its_start(words, tmp_path, starts):
    late = [*words, f"{TERM}.start_samples=9", "hydra.run.dir=late"]  # in the third step of 4
    assert train([*late, "trainer.max_steps=3"]) == 0
    assert same(
        starts[0][1], state_of(tmp_path / "late")["players"]["adversarial"]["discriminator"]
    )
    words = [word for word in words if word not in ADVERSARY]
    assert train([*words, "trainer.max_steps=3", "hydra.run.dir=none"]) == 0
    assert losses_of(tmp_path / "late") == losses_of(tmp_path / "none")
    assert train(["resume=late", "trainer.max_steps=6"]) == 0
    verdicts = floats(tmp_path / "late", "loss/adversarial")
    assert [step for step, value in verdicts.items() if value] == [4, 5, 6]
    assert list(floats(tmp_path / "late", "loss/discriminator")) == [4, 5, 6]
    assert not same(
        starts[0][1], state_of(tmp_path / "late")["players"]["adversarial"]["discriminator"]
    )


def test_both_optimizers_go_on_exactly(words, tmp_path):
    assert train([*words, "hydra.run.dir=whole"]) == 0
    assert train([*words, "trainer.max_steps=3", "hydra.run.dir=cut"]) == 0
    assert train(["resume=cut", "trainer.max_steps=6"]) == 0
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for column in ("loss/total", "loss/discriminator"):
        assert floats(cut, column) == floats(whole, column)
    assert_same_training(cut, whole)
    assert_same(state_of(cut)["players"], state_of(whole)["players"])
    moments = state_of(cut)["players"]["adversarial"]["optimizer"]["state"]
    assert moments and all(int(moment["step"]) == 6 for moment in moments.values())
    summary = json.loads((cut / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["samples_seen"] == 24


def test_accumulated_batches_are_one_batch(words, tmp_path):
    assert train([*words, "data.batch_size=4", "hydra.run.dir=one"]) == 0
    split = ["trainer.global_batch_size=4", "data.batch_size=2"]
    assert train([*words, *split, "hydra.run.dir=two"]) == 0
    assert_as_one(tmp_path / "two", tmp_path / "one")


def assert_as_one(two, one):
    for column in ("loss/total", "loss/adversarial", "loss/discriminator"):
        first, second = floats(two, column), floats(one, column)
        assert first.keys() == second.keys() and len(first) == 6
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4, abs=1e-5)
    states = [state_of(run)["players"]["adversarial"]["discriminator"] for run in (two, one)]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=3e-4)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_two_optimizers_on_two_ranks(words, tmp_path, strategy):
    if strategy == "fsdp2":  # also of a tokenizer without blocks
        words = [w for w in words if w not in SIZES["titok_tiny"]]
        words = ["tokenizer=vqgan_tiny", *words, *SIZES["vqgan_tiny"]]
    job = [*words, *TWO, f"trainer.strategy={strategy}", "hydra.run.dir=two"]
    process = fork(job)
    assert train([*words, "hydra.run.dir=one"]) == 0
    assert_ended(process, 0)
    assert_as_one(tmp_path / "two", tmp_path / "one")


def test_what_has_no_adversary(fails, words):
    flow = ["tokenizer=flextok_tiny", *words, "tokenizer.decoder.predicts=velocity"]
    fails("train", *flow, words=(TERM, "compares pixels", "image as velocity"))
