"""A prior that learns along with a tokenizer, against a loop by hand, resumed and on two ranks."""

import pytest
import torch
import torch.nn.functional as F

from helpers import SIZES, TINY, config_of, images_of, losses_of, metrics_of, tiny_tokenizer
from ranks import TWO, assert_ended, fork
from same_runs import assert_same, state_of
from vistok.cli import train
from vistok.core.errors import ConfigError
from vistok.losses.objective import build_objective
from vistok.models.build import build_tokenizer
from vistok.models.term import Step
from vistok.priors.player import LightPrior, PriorPlayer
from vistok.training.optimizers import build_optimizer

TERM = "loss.terms.prior"
WORDS = [
    *(word for word in TINY if not word.startswith("loss=")),
    "loss=mse_prior",
    f"{TERM}.width=16",
    f"{TERM}.depth=1",
    f"{TERM}.num_heads=2",
]


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ["data=folder", f"data.train={photos}", "data.val_fraction=0.3"]
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=4", "optimizer.total_samples=16"]
    return [*WORDS, *folder, *steps, "callbacks.checkpoint_every=2"]


def test_both_sides_get_the_gradients_of_their_own():
    tok = tiny_tokenizer().train()
    player = PriorPlayer(tok, width=16, depth=1, num_heads=2)
    player.equip(build_optimizer)
    images = tok.to_model_range(images_of(4))
    tok.initialize(images)
    output = tok(images)
    loss = player(Step(images, output, tok))
    loss.backward()
    assert all(p.grad is None for p in player.prior.parameters())
    reached = [n for n, p in tok.encoder.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(reached) > 3
    before = {n: p.grad.clone() for n, p in tok.named_parameters() if p.grad is not None}
    found = player.learn(0.5, torch.autocast("cpu", enabled=False))
    assert found["prior_player"] == pytest.approx(loss.item())
    for name, p in tok.named_parameters():
        assert p.grad is None or torch.equal(p.grad, before[name])
    own = {n: p.grad.clone() for n, p in player.prior.named_parameters()}
    copied = LightPrior(
        tok.quantizer.codebook_sizes, tok.num_tokens, None, tok.encoder.dim, 16, 1, 2
    )
    copied.load_state_dict(player.prior.state_dict())
    (0.5 * copied(output.quantizer.quantized.detach(), output.quantizer.indices)).backward()
    for name, p in copied.named_parameters():
        torch.testing.assert_close(own[name], p.grad)
    weights = [p.clone() for p in player.prior.parameters()]
    player.step(1.0)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights, player.prior.parameters(), strict=True)
    )


def test_it_learns_what_follows():
    torch.manual_seed(0)
    prior = LightPrior((5,), 8, None, 4, 16, 1, 2)
    table = torch.randn(5, 4)
    optimizer = torch.optim.AdamW(prior.parameters(), 1e-2)
    for _ in range(120):
        ids = (torch.randint(5, (16, 1)) + torch.arange(8)) % 5
        loss = prior(F.embedding(ids, table), ids[..., None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Only the first token is a surprise: log(5) of eight.
    assert loss.item() < 0.35


def test_an_interrupted_run_is_a_whole_one(words, tmp_path):
    assert train([*words, "hydra.run.dir=whole"]) == 0
    assert train([*words, "trainer.max_steps=2", "hydra.run.dir=part"]) == 0
    assert train(["resume=part", "trainer.max_steps=4"]) == 0
    whole, part = state_of(tmp_path / "whole"), state_of(tmp_path / "part")
    assert_same(whole["players"], part["players"])
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "part")
    rows = metrics_of(tmp_path / "whole")
    assert all(float(row["loss/prior"]) > 0 for row in rows if row.get("loss/total"))


@pytest.mark.ranks
def test_two_ranks_train_as_one_process(words, tmp_path):
    job = fork([*words, *TWO, "hydra.run.dir=two"])
    assert train([*words, "hydra.run.dir=one"]) == 0
    assert_ended(job, 0)
    one, two = (state_of(tmp_path / n)["players"]["prior"]["prior"] for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


def test_scales_are_refused():
    config = config_of(
        "tokenizer=titok_tiny",
        *SIZES["titok_tiny"],
        "quantizer=var",
        "loss=mse_prior",
        "data.image_size=16",
    )
    tok = build_tokenizer(config)
    with pytest.raises(ConfigError, match=r"^loss\.terms\.prior\.quantizer: MultiScaleVQ has ids"):
        build_objective(config["loss"], tok)
