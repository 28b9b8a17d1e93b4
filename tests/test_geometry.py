"""The grid of the tokens: encoders say it, and nobody takes a root of their number."""

import copy
import json
import math
from fractions import Fraction
from functools import cache

import pytest
import torch

import vistok
from helpers import SIZES, TINY, awake, config_of, images_of, tiny_tokenizer
from quantizers.test_multi_scale_vq import oracle
from vistok.checkpoints.migrate import migrate_config
from vistok.core.errors import ConfigError
from vistok.export.exporter import write_export
from vistok.models.build import build_tokenizer
from vistok.models.encoder import Encoder
from vistok.models.pretrained import feature_map
from vistok.models.stage import Source
from vistok.systems.titok.stages import LearnCodes

SCALES = ["image_folder", "token_flow_multi_scale", "var"]
GRIDS = {(64, 128): (8, 16), (96, 64): (12, 8)}  # a cell is 8 pixels wide

scales = pytest.mark.parametrize("name", SCALES)
sizes = pytest.mark.parametrize("size", GRIDS, ids=str)


@cache
def part_of(part, *words):
    base = [w for w in TINY if not w.startswith(("tokenizer.", "quantizer.", "data.image_size"))]
    return config_of(*base, *words)[part]


def tokenizer_of(name, size, tokenizer="vqgan_tiny", **options):
    """A tokenizer of width 16 whose quantizer holds something, and its config."""
    sized = [f"data.image_size=[{size[0]},{size[1]}]", *SIZES[tokenizer]]
    if tokenizer == "titok_tiny":
        sized.append("tokenizer.encoder.num_latent_tokens=16")
    config = {
        "tokenizer": copy.deepcopy(part_of("tokenizer", f"tokenizer={tokenizer}", *sized)),
        "quantizer": copy.deepcopy(
            part_of("quantizer", f"quantizer={name}", "tokenizer.latent_dim=16")
        ),
        "data": {"image_size": list(size), "channels": 3, "val_crop": "adm_center"},
    }
    config["quantizer"].update(codebook_size=64, **options)
    torch.manual_seed(0)
    tok = build_tokenizer(config)
    tok.initialize(tok.to_model_range(images_of(8, size)))
    return awake(tok).eval(), config


def expected_sizes(grid, scales):
    """Each axis times scale / last, rounded half up, and 1 at least."""

    def scaled(side, scale):
        return max(1, math.floor(Fraction(side * scale, scales[-1]) + Fraction(1, 2)))

    return [tuple(scaled(side, scale) for side in grid) for scale in scales]


@sizes
@scales
def test_ids_are_those_of_the_scales_of_the_true_grid(name, size, tmp_path):
    tok, config = tokenizer_of(name, size)
    grid = GRIDS[size]
    assert tok.encoder.grid == grid and not tok.quantizer.per_token
    parts = expected_sizes(grid, config["quantizer"]["scales"])
    count = sum(rows * columns for rows, columns in parts)
    images = images_of(3, size)
    ids = tok.tokenize(images)
    assert tok.num_tokens == count and ids.shape[1] == count
    assert tok.detokenize(ids).shape == (3, 3, *size)
    with torch.no_grad():
        latents = tok.encode(tok.to_model_range(images))
        output = tok.quantizer(latents, grid=grid)
        assert torch.equal(output.indices, ids)
        assert torch.equal(output.quantized, tok.quantizer.decode(ids, grid))
        assert output.quantized.shape == latents.shape
        assert (output.indices != tok.quantizer(latents, grid=grid[::-1]).indices).any()
    learning = tok.train()(tok.to_model_range(images)).quantizer
    assert learning.indices.shape == ids.shape
    mask = torch.ones(3, grid[0] * grid[1], dtype=torch.bool)
    assert tok.quantizer.index_mask(mask, grid).shape == (3, count)

    write_export(tok.eval(), config, tmp_path / "out", {})
    io = json.loads((tmp_path / "out" / "config.json").read_text())["io"]
    assert io["grid"] == list(grid) and io["num_tokens"] == count
    back = vistok.load(tmp_path / "out")
    assert torch.equal(back.tokenize(images), ids)


@sizes
@pytest.mark.parametrize("name", ["var", "image_folder"])
def test_ids_are_those_of_the_definition(name, size):
    tok, config = tokenizer_of(name, size)
    images = images_of(2, size)
    ids = tok.tokenize(images)
    parts = expected_sizes(GRIDS[size], config["quantizer"]["scales"])
    books = getattr(tok.quantizer, "branches", [tok.quantizer])
    expected, vectors = [], []
    with torch.no_grad():
        codes = tok.quantizer.project_in(tok.encode(tok.to_model_range(images)).float())
        for book, z in zip(books, codes.split(codes.shape[-1] // len(books), dim=-1), strict=True):
            phis = [[p.double() for p in phi.parameters()] for phi in book.phi]
            table = book.book.embedding.double()
            found, painted, _, _ = oracle(z.double(), table, phis, parts, ties=book.phi_ties)
            assert len(found.unique()) > 8
            expected.append(found)
            vectors.append(painted.float())
        expected = torch.cat(expected, dim=-1)
        assert (ids == expected).float().mean() > 0.995  # all but codes that are equally near
        decoded = tok.quantizer.decode(expected, GRIDS[size])
        painted = tok.quantizer.project_out(torch.cat(vectors, dim=-1))
    torch.testing.assert_close(decoded, painted, rtol=1e-4, atol=1e-4)


@scales
def test_a_code_without_a_grid_is_a_line_also_of_square_length(name):
    tok, config = tokenizer_of(name, (16, 16), "titok_tiny")
    assert tok.encoder.grid is None and tok.encoder.num_tokens == 16
    lengths = [n for _, n in expected_sizes((1, 16), config["quantizer"]["scales"])]
    ids = tok.tokenize(images_of(2))
    assert ids.shape[1] == tok.num_tokens == sum(lengths)
    assert tok.detokenize(ids).shape == (2, 3, 16, 16)
    with torch.no_grad():
        latents = tok.encode(tok.to_model_range(images_of(2)))
        line = tok.quantizer(latents, grid=(16,))
    assert torch.equal(line.indices, ids)
    assert torch.equal(line.quantized, tok.quantizer.decode(ids))


@scales
def test_a_config_can_lay_the_tokens_out_otherwise(name):
    tok, config = tokenizer_of(name, (16, 16), "titok_tiny", grid=[2, 8])
    parts = expected_sizes((2, 8), config["quantizer"]["scales"])
    ids = tok.tokenize(images_of(2))
    assert ids.shape[1] == tok.num_tokens == sum(rows * columns for rows, columns in parts)
    config["quantizer"]["grid"] = [3, 5]
    with pytest.raises(ConfigError, match=r"^quantizer\.grid=\[3, 5\]: .* must be 16$"):
        _ = build_tokenizer(config).num_tokens


@pytest.mark.parametrize(
    ("tokenizer", "grid"),
    [
        ("vqgan_tiny", (2, 4)),
        *[(name, None) for name in ("titok_tiny", "flextok_tiny", "gigatok_tiny", "retok_tiny")],
        *[(name, None) for name in ("restok_tiny", "hita_tiny", "ta_titok_tiny")],
    ],
)
def test_encoders_say_where_their_tokens_lie(tokenizer, grid):
    """The grid of the patches that a 1D code is read from is not that of its tokens."""
    tok = tiny_tokenizer("data.image_size=[16,32]", tokenizer=tokenizer)
    assert tok.encoder.grid == grid
    assert grid is None or math.prod(grid) == tok.encoder.num_tokens


def test_features_of_oblong_images_lie_as_the_patches_do():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 96), depth=1, pretrained=False, num_classes=0
    ).eval()
    images = torch.randn(1, 3, 32, 96)
    with torch.no_grad():
        found, tokens = feature_map(model, images), model.forward_features(images)
    assert found.shape == (1, 192, 2, 6)
    assert torch.equal(found[:, :, 1, 2], tokens[:, 1 + 6 + 2])


class Oblong(Encoder):
    """Cells of 8 x 16 pixels."""

    def __init__(self, image_size: int, dim: int) -> None:
        super().__init__()
        self.dim, self.grid = dim, (image_size // 8, image_size // 16)
        self.num_tokens = math.prod(self.grid)

    def forward(self, images):
        raise NotImplementedError


def test_a_proxy_must_have_square_cells():
    tok = tiny_tokenizer("data.image_size=32", tokenizer="vqgan_tiny")
    config = {"tokenizer": {"decoder": {"_target_": "latent_vit_decoder"}}}
    source = Source("runs/oblong", {"tokenizer": {"decoder": {}}}, tok)
    assert LearnCodes().resolve(config, source)["tokenizer"]["decoder"]["patch_size"] == 8
    tok.encoder = Oblong(32, tok.encoder.dim)
    message = r"^stage\.proxy=runs/oblong: must have square cells, found 4 x 2 of them in"
    with pytest.raises(ConfigError, match=message):
        LearnCodes().resolve(config, source)


CNN = {"_target_": "vistok.encoders.cnn.CNNEncoder", "channel_multipliers": [1, 2], "stem": 4}
MASKGIT = {"_target_": "vistok.encoders.maskgit.MaskGITEncoder", "channel_multipliers": [1, 2, 2]}
VIT = {"_target_": "vistok.encoders.latent_vit.LatentTransformerEncoder", "image_size": 64}


@pytest.mark.parametrize(
    ("encoder", "old", "new"),
    [
        ({**CNN, "image_size": 64}, "auto", None),  # 8 x 8
        ({**CNN, "image_size": 64}, "2d", None),
        ({**CNN, "image_size": 64}, "1d", [64]),
        ({**CNN, "image_size": [64, 128]}, "auto", [128]),
        ({**CNN, "image_size": [64, 128]}, None, [128]),  # the default
        ({**CNN, "image_size": [32, 128]}, "auto", [8, 8]),  # 4 x 16
        ({**CNN, "image_size": [32, 128]}, "1d", [64]),
        ({**MASKGIT, "image_size": [16, 64]}, "auto", [8, 8]),  # 4 x 16, without a stem
        ({**VIT, "num_latent_tokens": 64}, "auto", [8, 8]),
        ({**VIT, "num_latent_tokens": 64}, "1d", None),
        ({**VIT, "num_latent_tokens": 48}, "auto", None),
        ({**VIT, "num_latent_tokens": 48}, "1d", None),
        ({**CNN, "image_size": 64}, [4, 16], [4, 16]),
        ({"_target_": "mine.Encoder"}, None, "auto"),  # which the quantizer refuses
    ],
)
@pytest.mark.parametrize("kind", ["multi_scale_vq.MultiScaleVQ", "dual_vq.ImageFolder"])
def test_old_configs_keep_their_grids(encoder, old, new, kind):
    quantizer = {"_target_": f"vistok.quantizers.{kind}", "scales": [1, 2, 4]}
    given = quantizer if old is None else {**quantizer, "grid": old}
    product = {"_target_": "vistok.quantizers.product_vq.Product", "books": [given, given]}
    for part, inner in ((given, lambda q: [q]), (product, lambda q: q["books"])):
        config = {"tokenizer": {"encoder": encoder}, "quantizer": part}
        migrated = migrate_config(config, "old")["quantizer"]
        assert [q["grid"] for q in inner(migrated)] == [new] * len(inner(part))
        assert given.get("grid") == old  # what was given stays as it is


def test_other_options_of_that_name_stay():
    quantizer = {"_target_": "vistok.quantizers.fsq.FSQ", "grid": "symmetric"}
    config = {"tokenizer": {"encoder": {**CNN, "image_size": 64}}, "quantizer": quantizer}
    assert migrate_config(config, "old")["quantizer"]["grid"] == "symmetric"


def test_a_grid_that_no_step_could_name_is_refused():
    config = {"tokenizer": part_of("tokenizer", "tokenizer=titok_tiny", *SIZES["titok_tiny"])}
    config["quantizer"] = {**part_of("quantizer", "quantizer=var"), "grid": "auto"}
    with pytest.raises(
        ConfigError, match=r"^quantizer\.grid=auto: must be \[rows, columns\].* or null$"
    ):
        build_tokenizer(config)
