"""Every grid family at sizes that are not square, with one channel, and at other sizes than trained."""

import io
import math

import pytest
import torch
from PIL import Image

from helpers import TINY, config_of, metrics_of, picture
from vistok.cli import train
from vistok.core.registry import registered
from vistok.data.shards import ShardWriter
from vistok.models.build import build_tokenizer
from vistok.models.grid import GridTokenizer

FAMILIES = [
    f"{name}_tiny"
    for name in (
        "autoencoder", "bsq_vit", "chameleon", "cosmos", "emu3", "ibq", "janus", "llamagen", "maskbit",
        "maskgit_vqgan", "open_magvit2", "rq_vae", "taming", "taming_gumbel", "var", "vit_vqgan",
        "vqgan",
    )
]  # fmt: skip
#: Those that are small as they are.
WIDE = ("bsq_vit_tiny", "maskgit_vqgan_tiny", "vit_vqgan_tiny", "vqgan_tiny")
SIZE, OTHER = (64, 96), (32, 64)


def built(name, size, channels=1):
    torch.manual_seed(0)
    words = [f"experiment={name}", f"data.image_size=[{size[0]},{size[1]}]"]
    small = ["tokenizer.encoder.base_channels=32"] * (name not in WIDE)
    if name == "vit_vqgan_tiny":
        small.append(f"tokenizer.decoder.decoder.channels={2 * channels}")
    config = config_of(*words, f"data.channels={channels}", *small)
    return build_tokenizer(config)


def images_of(count, size, channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, *size, generator=generator)


def test_no_family_is_forgotten():
    """Of the systems that are registered."""
    kinds = [kind for kind in registered().values() if isinstance(kind, type)]
    grids = {
        kind.__name__.lower().removesuffix("tokenizer")
        for kind in kinds
        if issubclass(kind, GridTokenizer)
    }
    found = {name.removesuffix("_tiny").replace("_", "") for name in FAMILIES}
    # VQGAN as published, with Gumbel codes, with a stem, and with MaskGIT's CNN.
    same = dict.fromkeys(("taming", "taminggumbel", "maskgitvqgan"), "vqgan")
    same["autoencoder"] = "klautoencoder"
    assert grids - {"grid"} == {same.get(name, name) for name in found}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_channel_of_64_by_96(name):
    tok, images = built(name, SIZE).train(), images_of(2, SIZE)
    output = tok(2 * images - 1)
    picture = output.predictions["image"].value
    assert picture.shape[-2:] == SIZE and picture.shape[1] in (1, 2)
    losses = [tok.quantizer.loss_weights[k] * v for k, v in output.quantizer.losses.items()]
    ((picture - 0.3).square().mean() + sum(losses)).backward()
    for part in (tok.encoder, tok.decoder):
        gradients = [p.grad for p in part.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert sum(g.any().item() for g in gradients) > len(gradients) / 2
    tok.eval()
    ids = tok.tokenize(images)
    rows, columns = tok.encoder.grid
    assert rows * 3 == columns * 2 and ids.shape[1] == tok.quantizer.num_index_tokens(
        rows * columns, tok.encoder.grid
    )
    found = tok.detokenize(ids)
    assert found.shape == images.shape and found.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_size_that_was_not_trained(name):
    """The tokenizer of one size gives, at another, what one that is built for it gives."""
    tok, images = built(name, SIZE).eval(), images_of(3, OTHER)
    tok.initialize(2 * images_of(8, SIZE) - 1)  # as drawn, some have one code for all
    other = tok.at(OTHER)
    state = dict(tok.state_dict())
    twin = built(name, OTHER).eval()
    for key, value in twin.state_dict().items():
        if state[key].shape != value.shape:  # learned positions: those of `at` are interpolated
            part = other.get_submodule(key.rpartition(".")[0])
            state[key] = part._resized(part.positions).detach()
    twin.load_state_dict(state)
    ids = other.tokenize(images)
    assert torch.equal(ids, twin.tokenize(images)) and ids.unique().numel() > 1
    assert torch.allclose(other.detokenize(ids), twin.detokenize(ids), atol=1e-5)
    assert tok.image_size == SIZE


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_different_sizes_get_the_ids_that_each_has_alone(name):
    tok = built(name, OTHER).eval()
    sizes = [OTHER, SIZE, (64, 32), OTHER]
    images = [images_of(n + 1, size)[n] for n, size in enumerate(sizes)]
    for image, ids in zip(images, tok.tokenize(images), strict=True):
        alone = tok.at(image.shape[1:]).tokenize(image[None])[0]
        assert torch.equal(ids, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamagen_tiny", "vit_vqgan_tiny"])
def test_aspect_buckets_train(name, tmp_path, monkeypatch):
    """Pictures of three shapes, with an adversary that judges each at its own size."""
    with ShardWriter(tmp_path / "shards", "train") as writer:
        for number in range(24):
            file, shape = io.BytesIO(), ((24, 24), (24, 48), (48, 24))[number % 3]
            Image.fromarray(picture(number, *shape)).save(file, "png")
            writer.write(file.getvalue(), "png", size=shape)
    seen, forward = set(), GridTokenizer.forward

    def spied(self, images, *args, **more):
        if self.training:
            seen.add(tuple(images.shape[-2:]))
        return forward(self, images, *args, **more)

    monkeypatch.setattr(GridTokenizer, "forward", spied)
    words = [w for w in TINY if not w.startswith(("tokenizer.", "quantizer.", "data.image_size"))]
    small = ["tokenizer.encoder.base_channels=32"] * (name not in WIDE)
    job = [
        f"experiment={name}", *words, *small, "data=shards", f"data.train={tmp_path}/shards/*.tar",
        "data.image_size=16", "data.buckets=[[16,16],[16,32],[32,16]]", "data.val_fraction=0.2",
        "data.batch_size=2", "quantizer.codebook_size=16", "trainer.max_steps=9", "adversary=patch",
        "loss.terms.adversarial.start=0", "loss.terms.adversarial.warmup=0",
        "loss.terms.adversarial.discriminator.num_layers=2",
    ]  # fmt: skip
    assert train([*job, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert seen == {(16, 16), (16, 32), (32, 16)}
    losses = [float(r["loss/total"]) for r in metrics_of(tmp_path / "run") if r.get("loss/total")]
    assert len(losses) == 9 and all(map(math.isfinite, losses))
