"""Fine-tuning of imported tokenizers: what learns, what stays bit for bit, and when a fresh
discriminator counts."""

import pytest
import torch
from safetensors.torch import save_file

import vistok
from helpers import TINY, config_of, images_of
from published_grids import published
from test_import_weights import titok
from vistok.cli import import_weights, train
from vistok.tasks.sources import resolve_source

TERM = "loss.terms.adversarial"
ADVERSARY = (
    "adversary=patch", f"{TERM}.discriminator.base_channels=4", f"{TERM}.discriminator.num_layers=2",
    f"{TERM}.weight=0.3", f"{TERM}.start_samples=8", f"{TERM}.warmup_samples=8", f"{TERM}.ramp=0",
)  # fmt: skip
FROZEN = {
    "decoder": ("stage.frozen=[encoder,quantizer]",),
    "codebook": ("stage.frozen=[quantizer]",),
    "full": (),
}
SOURCES = {
    "llamagen": lambda: published("llamagen"),
    "titok": lambda: titok(two_stages=False),
    "titok of two stages": titok,
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Random weights in the official layouts, imported; do not write to them."""
    folder, found = tmp_path_factory.mktemp("imported"), {}
    for name, tensors in SOURCES.items():
        file, out = folder / "w.safetensors", folder / name.replace(" ", "_")
        save_file({k: v.contiguous() for k, v in tensors().items()}, file)
        words = [f"source={name.split()[0]}", f"weights={file}", f"out={out}"]
        assert import_weights([*words, *["image_size=16"] * (name == "llamagen")]) == 0
        found[name] = out
    return found


@pytest.fixture
def words(photos):
    sizes = ("tokenizer.", "quantizer.")
    kept = [word for word in TINY if not word.startswith(sizes)]
    data = ["data=folder", f"data.train={photos}", "data.val_fraction=0.2"]
    return [*kept, *data, "trainer.max_steps=2", "optimizer.total_samples=16", "ema.decay=0.5"]


def moved(run, source, part, weights="last"):
    """Compare a part of a run with its source: did any tensor change, and did all of them?"""
    old, new = vistok.load(source), vistok.load(run, weights=weights)
    state = new.get_submodule(part).state_dict()
    same = [
        torch.equal(state[name], value)
        for name, value in old.get_submodule(part).state_dict().items()
        if value.is_floating_point() and not name.startswith(("usage", "stats"))
    ]
    assert same
    return not any(same), not all(same)


@pytest.mark.slow
@pytest.mark.parametrize("learns", FROZEN)
@pytest.mark.parametrize("name", SOURCES)
def test_a_fresh_discriminator_is_warmed_up(name, learns, imported, words, cli, tmp_path):
    source = imported[name]
    job = [*words, *FROZEN[learns], f"init_from={source}"]
    if name == "titok of two stages" and learns == "decoder":
        job = [*words, "stage=decoder", f"stage.weights={source}"]
    code, _, out = cli("train", *job, *ADVERSARY, "hydra.run.dir=run")
    assert code == 0
    assert "adversarial is untrained: it learns alone from image 0 to 8, and counts" in out
    assert train([*job, "hydra.run.dir=plain"]) == 0
    # Two steps of four images: all gradients so far are those of a run without it, bit for bit.
    run, plain = tmp_path / "run", tmp_path / "plain"
    found, expected = (vistok.load(each, weights="last").state_dict() for each in (run, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["players"]
    assert state["adversarial"]["steps"] == 2
    assert train(["resume=run", "trainer.max_steps=3"]) == 0
    assert train(["resume=plain", "trainer.max_steps=3"]) == 0
    found, expected = (vistok.load(each, weights="last").decoder for each in (run, plain))
    assert not torch.equal(found.last_layer, expected.last_layer)  # now it counts
    for weights in ("last", "ema"):
        assert any(moved(run, source, "decoder", weights))
        assert any(moved(run, source, "encoder", weights)) == (learns != "decoder")
        assert any(moved(run, source, "quantizer", weights)) == (learns == "full")
    images = images_of(4)
    same = torch.equal(vistok.load(run).tokenize(images), vistok.load(source).tokenize(images))
    assert same or learns != "decoder"


def resolved(source, *words):
    """The adversary's options of a run that starts from `source`."""
    config = config_of(*words) | {"init_from": str(source)}
    return resolve_source(config, words)["loss"]["terms"]["adversarial"]


def test_recipes_without_warm_up_get_one_unless_told(imported, tmp_path):
    source, adversary = imported["llamagen"], "adversary=llamagen"
    assert not config_of(adversary)["loss"]["terms"]["adversarial"]["warmup"]
    found = resolved(source, adversary)
    assert (found["warmup"], found["start"], found["start_samples"]) == (0.05, 0.0, 2560000)
    found = resolved(source, adversary, f"{TERM}.start_samples=0")
    assert (found["warmup"], found["start"], found["start_samples"]) == (0.05, 0.05, 0)
    found = resolved(source, adversary, f"{TERM}.start_samples=0", f"{TERM}.start=0.3")
    assert (found["warmup"], found["start"]) == (0.05, 0.3)
    for key in ("warmup=0", "warmup_samples=0"):  # who says so means it
        found = resolved(source, adversary, f"{TERM}.{key}", f"{TERM}.start_samples=0")
        assert (found["warmup"], found["start"]) == (0, 0)
    # One that has learned is not fresh.
    assert not resolved(source, adversary, f"{TERM}.weights={tmp_path / 'd.pt'}")["warmup"]
    # And what has a warm-up keeps it.
    found = resolved(source, "adversary=patch", f"{TERM}.warmup_samples=7")
    assert (found["warmup_samples"], found["warmup"]) == (7, 0.05)


def test_one_that_is_told_to_count_at_once_says_so(imported, words, cli):
    told = [f"{TERM}.{key}=0" for key in ("start_samples", "warmup_samples", "start", "warmup")]
    job = [*words, f"init_from={imported['llamagen']}", *ADVERSARY, *told, "trainer.max_steps=1"]
    code, _, out = cli("train", *job, "hydra.run.dir=run")
    assert code == 0 and "untrained, and counts from image 0 on without warm-up" in out
