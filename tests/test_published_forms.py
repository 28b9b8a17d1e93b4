"""Every class computes its published form by default, in all presets; older runs say which one."""

import copy

import pytest
import torch

from helpers import TINY, config_of
from vistok.checkpoints.old_forms import say_forms
from vistok.core.errors import ConfigError
from vistok.models.build import starts_from_data
from vistok.tasks.reconstruction import Reconstruction

#: What deviates from a published form, by preset: an option and what it says by default.
DEVIATIONS = {
    "titok": {"encoder.class_token": True, "decoder.class_token": True, "decoder.border": "black"},
    "gigatok": {"encoder.norm": "input", "decoder.norm": "input"},
    "flextok": {"encoder.norm_in": False, "encoder.causal": True, "encoder.class_token": False,
                "decoder.time_dim": 256, "decoder.slowest_time": 4.0792},
    "restok": {"encoder.merge_axis": "columns", "encoder.places": "queued",
               "encoder.level_vectors": "block", "decoder.places": "queued", "decoder.norms": True},
    "hita": {"encoder.block": "biased", "encoder.embed": "conv", "decoder.block": "biased"},
}  # fmt: skip
DEVIATIONS |= dict.fromkeys(("one_d_piece", "ta_titok"), DEVIATIONS["titok"])
DEVIATIONS["retok"] = DEVIATIONS["gigatok"]

EXPERIMENTS = [
    *("titok_tiny", "titok_s128", "titok_l32", "one_d_piece_tiny", "one_d_piece_s256"),
    *("ta_titok_tiny", "ta_titok_bl32", "gigatok_tiny", "gigatok_b_l", "retok_tiny", "retok_s_b"),
    *("flextok_tiny", "flextok_d18_d28", "restok_tiny", "restok_l", "hita_tiny", "hita_336"),
]


def at(tokenizer, key):
    part, _, option = key.partition(".")
    return tokenizer[part][option]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_tiny_and_paper_presets_compute_the_published_form(experiment):
    """And so do the classes themselves, where nothing is said."""
    import inspect

    from vistok.core.registry import resolve

    tokenizer = config_of(f"experiment={experiment}")["tokenizer"]
    wanted = next(DEVIATIONS[n] for n in sorted(DEVIATIONS, key=len)[::-1] if experiment.startswith(n))  # fmt: skip
    for key, value in wanted.items():
        assert at(tokenizer, key) == value, key
        part, _, option = key.partition(".")
        parameters = inspect.signature(resolve(tokenizer[part]["_target_"])).parameters
        assert parameters[option].default == value, key


# ---------------------------------------------------------------------- older runs


def described(target, **options):
    return {"_target_": f"vistok.old.place.{target}", **options}


#: A part as form 1 described it, and what has become of its options.
CASES = [
    (described("LatentTransformerEncoder", width=8), {"width": 8}),
    (described("LatentTransformerEncoder", block="vit", norm_in=True, legacy_reshape=False),
     {"norm_in": True}),
    (described("LatentTransformerEncoder", legacy_reshape=True),
     {"_target_": "reshaped_latent_vit_encoder"}),
    (described("LatentTransformerEncoder", block="flextok", class_token=False, causal=True),
     {"_target_": "flextok_encoder", "class_token": False,
      "causal": True, "content": 0.125, "norm_in": True}),
    (described("LatentTransformerEncoder", block="flextok", norm_in=False, content=1.0),
     {"_target_": "flextok_encoder", "class_token": True,
      "causal": False, "content": 1.0, "norm_in": False}),
    (described("LatentTransformerDecoder"), {"border": "edge"}),
    (described("LatentTransformerDecoder", borders="repeated"), {"border": "edge"}),
    (described("TextTransformerDecoder", borders="black"), {"border": "black"}),
    (described("ProxyDecoder", learns="codes"), {"learns": "codes"}),
    (described("FlowDecoder", width=8), {"width": 8, "time_dim": 8, "slowest_time": 1.0}),
    (described("FlowDecoder", width=8, time_dim=None, slowest_time=2.0),
     {"width": 8, "time_dim": 8, "slowest_time": 2.0}),
    (described("FlowDecoder", width=8, time_dim=256), {"width": 8, "time_dim": 256, "slowest_time": 1.0}),
    (described("QFormerEncoder"), {"norm": "embedding"}),
    (described("QFormerDecoder", norm_first=True), {"norm": "input"}),
    (described("QFormerDecoder", norm_first=False), {"norm": "embedding"}),
    (described("ResTokEncoder"),
     {"merge_axis": "longest", "places": "centered", "level_vectors": "merge"}),
    (described("ResTokEncoder", released=True, legacy_reshape=False),
     {"merge_axis": "columns", "places": "queued", "level_vectors": "block"}),
    (described("ResTokEncoder", released=True, legacy_reshape=True),
     {"_target_": "reshaped_restok_encoder",
      "merge_axis": "columns", "places": "queued", "level_vectors": "block"}),
    (described("ResTokDecoder", released=False), {"places": "centered", "norms": False}),
    (described("ResTokDecoder", released=True), {"places": "queued", "norms": True}),
    (described("HitaEncoder"), {"block": "normalized", "embed": "linear"}),
    (described("HitaEncoder", released=True), {"block": "biased", "embed": "conv"}),
    (described("HitaDecoder", released=True), {"block": "biased"}),
    (described("HitaDecoder"), {"block": "normalized"}),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), CASES)
def test_options_of_form_1(old, new):
    """Wherever the part is: in a tokenizer, or in what a tokenizer is made of."""
    new = {"_target_": old["_target_"], **new}
    for where in (("encoder",), ("autoencoder", "decoder"), ("decoder", "pixel_decoder")):
        config = inner = {}
        for name in ("tokenizer", *where):
            inner[name] = {"_target_": "vistok.models.other.Whole"}
            inner = inner[name]
        inner.update(copy.deepcopy(old))
        say_forms(config)
        part = config["tokenizer"]
        for name in where:
            part = part[name]
        assert part == new


def test_other_parts_stay_as_they_are():
    part = {"_target_": "vistok.decoders.cnn.CNNDecoder", "released": True, "borders": 1}
    config = {"tokenizer": {"encoder": part}, "quantizer": part | {"block": 2}}
    before = copy.deepcopy(config)
    say_forms(config)
    assert config == before


# ---------------------------------------------------------------------- the start


class Data:
    """Counts who asks it for images."""

    asked = 0

    def init_batches(self, count):
        self.asked += 1
        return torch.rand(8, 3, 16, 16)


@pytest.mark.parametrize(("words", "asked"), [(["init=random"], 0), ([], 1)])
def test_a_random_start_leaves_the_weights_as_they_are_drawn(words, asked):
    task = Reconstruction(config_of("experiment=titok_tiny", *TINY, *words))
    before, data = copy.deepcopy(task.tokenizer.state_dict()), Data()
    task.start_weights(data, torch.device("cpu"))
    after = task.tokenizer.state_dict()
    same = all(torch.equal(value, before[name]) for name, value in after.items())
    assert same == (asked == 0) and data.asked == asked


def test_a_start_that_makes_no_sense_is_refused():
    assert config_of("experiment=titok_tiny")["init"] == "data"
    with pytest.raises(ConfigError, match=r"^init=zero: must be data or random$"):
        starts_from_data({"init": "zero", "tokenizer": {}})
    with pytest.raises(ConfigError, match=r"^init=zero"):  # as soon as the run is built
        Reconstruction(config_of("experiment=titok_tiny", *TINY, "init=zero"))
