"""TiTok's stages: what learns, what stays bit for bit, and what comes out of each."""

import math
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import vistok
from helpers import (
    CONFIGS,
    SIZES,
    TINY,
    compared,
    config_of,
    images_of,
    metrics_of,
    stepped,
    tiny_tokenizer,
)
from vistok.cli import evaluate, export, train
from vistok.core.errors import ConfigError
from vistok.losses.codes import CodeLoss
from vistok.nn.frozen import Frozen
from vistok.tasks.reconstruction import Reconstruction
from vistok.tasks.stages import resolve_stage
from vistok.training.ema import EMA

WORDS = [w for w in TINY if w != "loss=mse"]
COMMON = ["trainer.max_steps=5", "trainer.val_check_interval=2"]


def data_words(photos):
    return ["data=folder", f"data.train={photos}", "data.val_fraction=0.2", "data.image_size=16"]


@pytest.fixture(scope="module")
def proxy_run(tmp_path_factory, photos):
    """A 2D tokenizer of 2 x 2 cells with 16 codes."""
    run = tmp_path_factory.mktemp("proxy") / "run"
    words = [w for w in TINY if w not in SIZES["titok_tiny"]] + SIZES["vqgan_tiny"]
    assert train(["experiment=vqgan_tiny", *words, *data_words(photos), *COMMON, f"hydra.run.dir={run}"]) == 0  # fmt: skip
    return run


@pytest.fixture(scope="module", params=["titok_tiny", "one_d_piece_tiny"])
def stages(request, proxy_run, tmp_path_factory, photos):
    """The runs of both stages, by the commands that a user gives."""
    folder = tmp_path_factory.mktemp("stages")
    first, second = folder / "first", folder / "second"
    words = [f"experiment={request.param}", *WORDS, *data_words(photos), *COMMON]
    assert train([*words, "stage=proxy", f"stage.proxy={proxy_run}", f"hydra.run.dir={first}"]) == 0
    words = [*words, "stage=decoder", f"stage.weights={first}"]
    assert train([*words, f"hydra.run.dir={second}"]) == 0
    return proxy_run, first, second


def module_of(run) -> Reconstruction:
    return Reconstruction(yaml.safe_load((run / "config.yaml").read_text()))


def weights_of(run):
    return vistok.load(run / "checkpoints" / "last.ckpt", weights="last").state_dict()


@pytest.mark.slow
def test_first_stage_learns_the_codes_of_the_proxy(stages):
    proxy_run, run, _ = stages
    proxy, module = vistok.load(proxy_run), module_of(run)
    module.train()
    images = images_of(6)
    step = stepped(module, module.tokenizer.to_model_range(images))
    output = step.output
    assert torch.equal(output.predictions["codes"].target, proxy.tokenize(images)[..., 0])
    assert output.predictions["codes"].value.shape == (6, 4, 16)
    losses = module.objective(step)
    expected = F.cross_entropy(
        output.predictions["codes"].value.reshape(24, 16),
        output.predictions["codes"].target.reshape(24),
    )
    assert losses["codes"].item() == pytest.approx(expected.item(), rel=1e-5)
    rows = [float(r["loss/codes"]) for r in metrics_of(run) if r.get("loss/codes")]
    assert rows[0] == pytest.approx(math.log(16), abs=0.3)


def test_first_stage_decodes_through_the_proxys_decoder(stages):
    proxy_run, run, _ = stages
    proxy, tok = vistok.load(proxy_run), vistok.load(run)
    ids = tok.tokenize(images_of(5))
    assert ids.shape == (5, 4, 1)
    with torch.no_grad():
        codes = tok.decoder.logits(tok.quantizer.decode(ids)).argmax(dim=-1, keepdim=True)
    assert torch.allclose(tok.detokenize(ids), proxy.detokenize(codes), atol=1e-5)


def test_second_stage_decodes_expected_codes(stages):
    proxy_run, _, run = stages
    tok = vistok.load(run)
    ids = tok.tokenize(images_of(5))
    with torch.no_grad():
        p = tok.decoder.logits(tok.quantizer.decode(ids)).double().softmax(-1)
        vectors = torch.einsum("bnk,kd->bnd", p, tok.decoder.code_vectors.weight.double())
        pictures = tok.decoder.pixel_decoder.reconstruct(vectors.float())
    assert torch.allclose(tok.detokenize(ids), ((pictures + 1) / 2).clamp(0, 1), atol=1e-5)


def test_expected_codes_are_exact_under_autocast(stages, monkeypatch):
    """Over a thousand codes, weights of eight bits would not add up to one."""
    tok, logits, vectors = vistok.load(stages[2]), [], []
    tok.decoder.head.register_forward_hook(lambda m, i, o: logits.append(o))
    reconstruct = tok.decoder.pixel_decoder.reconstruct
    monkeypatch.setattr(
        tok.decoder.pixel_decoder,
        "reconstruct",
        lambda v, **more: vectors.append(v) or reconstruct(v),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tok.decoder.reconstruct(torch.randn(2, 4, 16))
    assert logits[0].dtype == torch.bfloat16
    expected = logits[0].double().softmax(-1) @ tok.decoder.code_vectors.weight.double()
    assert torch.allclose(vectors[0].double(), expected, atol=1e-6)


def gradients(module):
    module.train()
    step = stepped(module, module.tokenizer.to_model_range(images_of(6)))
    module.objective(step)["total"].backward()
    named = module.tokenizer.named_parameters()
    return {n for n, p in named if p.grad is not None and p.grad.abs().max() > 0}, step.output


def of(names, *prefixes):
    return {n for n in names if n.startswith(prefixes)}


def test_which_parameters_learn_in_the_first_stage(stages):
    module = module_of(stages[1])
    reached, _ = gradients(module)
    assert not of(reached, "decoder.pixel_decoder", "decoder.code_vectors")
    for part in ("encoder.", "quantizer.project_in", "decoder.transformer", "decoder.head"):
        assert of(reached, part), part
    grouped = {id(p) for g in module_optimizer(module).param_groups for p in g["params"]}
    names = {n for n, p in module.tokenizer.named_parameters() if id(p) in grouped}
    assert not of(names, "decoder.pixel_decoder", "decoder.code_vectors") and reached <= names


def test_which_parameters_learn_in_the_second_stage(stages):
    module = module_of(stages[2])
    reached, output = gradients(module)
    assert not of(reached, "encoder", "quantizer") and not output.quantizer.losses
    for part in ("decoder.transformer", "decoder.head", "decoder.code_vectors", "decoder.pixel_decoder"):  # fmt: skip
        assert of(reached, part), part
    grouped = {id(p) for g in module_optimizer(module).param_groups for p in g["params"]}
    assert not any(id(p) in grouped for p in module.tokenizer.encoder.parameters())
    assert not any(id(p) in grouped for p in module.tokenizer.quantizer.parameters())


def module_optimizer(module):
    from vistok.training.optimizers import build_optimizer

    return build_optimizer(module.tokenizer, 1e-3, (0.9, 0.99), 0.01)


def same(a, b, prefix):
    """Whether all and whether any entries under `prefix` are bit-identical."""
    keys = of(a, prefix)
    assert keys and keys == of(b, prefix), prefix
    return {k for k in keys if torch.equal(a[k], b[k])} == keys


def test_first_stage_leaves_the_proxy_as_it_is(stages):
    proxy_run, run, _ = stages
    proxy, state = vistok.load(proxy_run), weights_of(run)
    for name, value in proxy.decoder.state_dict().items():
        assert torch.equal(state[f"decoder.pixel_decoder.{name}"], value), name
    table = proxy.quantizer.decode(torch.arange(16)[None, :, None])[0]
    assert torch.equal(state["decoder.code_vectors.weight"], table)
    assert not any("proxy" in name for name in state)  # used, not owned: nothing of its encoder


def test_second_stage_keeps_encoder_and_codebook_bit_for_bit(stages):
    _, first, second = stages
    before, after = vistok.load(first).state_dict(), weights_of(second)
    assert before.keys() == after.keys()
    assert any("stats" in k for k in before)  # the codebook's statistics are among them
    assert same(before, after, "encoder.") and same(before, after, "quantizer.")
    for part in ("decoder.transformer", "decoder.head", "decoder.code_vectors", "decoder.pixel_decoder"):  # fmt: skip
        assert not same(before, after, part), part
    images = images_of(8)
    assert torch.equal(vistok.load(first).tokenize(images), vistok.load(second).tokenize(images))


def test_exports_and_evaluation_after_each_stage(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = images_of(4)
    for number, run in enumerate(stages[1:]):
        assert evaluate([f"run={run}", f"out=e{number}"]) == 0
        assert export([f"run={run}", f"out=x{number}"]) == 0
        tok, back = vistok.load(run), vistok.load(f"x{number}")
        ids = tok.tokenize(images)
        assert torch.equal(back.tokenize(images), ids)
        assert torch.equal(back.detokenize(ids), tok.detokenize(ids))
        assert Path(f"e{number}/metrics.json").is_file()


def test_both_stages_resume(stages, tmp_path):
    import shutil

    for number, run in enumerate(stages[1:]):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        assert train([f"resume={copy}", "trainer.max_steps=7"]) == 0
    second = weights_of(tmp_path / "1")
    assert same(vistok.load(stages[1]).state_dict(), second, "quantizer.")


# ---------------------------------------------------------------------- what the words ask for


def second_words(stages, photos):
    name = "one_d_piece_tiny" if "length" in module_of(stages[2]).config["tokenizer"] else "titok_tiny"  # fmt: skip
    words = [f"experiment={name}", *WORDS, *data_words(photos), *COMMON]
    return [*words, "stage=decoder", f"stage.weights={stages[1]}"]


def test_second_stage_computes_as_it_is_told(stages, photos):
    words = second_words(stages, photos)
    first = resolve_stage(config_of(*words), words)["tokenizer"]
    words += ["tokenizer.encoder.attention=flex", "tokenizer.decoder.activation_checkpointing=true"]
    if "length" in first:
        words += ["tokenizer.length.distribution=full"]
    config = resolve_stage(config_of(*words), words)
    told = config["tokenizer"]
    assert told["encoder"]["attention"] == told["decoder"]["attention"] == "flex"
    assert told["decoder"]["activation_checkpointing"]
    if "length" in first:
        assert first["length"]["distribution"] == "uniform"
        assert told["length"]["distribution"] == "full"
    for part in ("encoder", "decoder"):  # and all else is the first stage's
        rest = {"attention": "dense", "activation_checkpointing": False}
        assert {**told[part], **rest} == first[part]
    state = Reconstruction(config).tokenizer.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in weights_of(stages[1]).items()}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("tokenizer.encoder.num_latent_tokens=9", "tokenizer.encoder.num_latent_tokens=4"),
        ("tokenizer.decoder.depth=3", "tokenizer.decoder.depth=1"),
        ("quantizer.codebook_size=77", "quantizer.codebook_size=16"),
        ("quantizer=fsq", "quantizer._target_=vq"),
        ("tokenizer.decoder.patch_size=4", "tokenizer.decoder.patch_size=8"),
        ("+tokenizer.decoder.learns=codes", "tokenizer.decoder.learns=pixels"),
    ],
)
def test_words_that_the_second_stage_cannot_follow_are_refused(stages, photos, word, found):
    words = [w for w in second_words(stages, photos) if not (word == "quantizer=fsq" and w.startswith("quantizer"))]  # fmt: skip
    words = [*words, word]
    with pytest.raises(ConfigError) as error:
        resolve_stage(config_of(*words), words)
    expected = f"{word}: stage=decoder takes {found} from stage.weights={stages[1]}; "
    assert str(error.value).startswith(expected)


def test_a_choice_of_the_tokenizer_that_agrees_is_no_contradiction(stages, photos):
    words = second_words(stages, photos)
    words.insert(0, words[0].replace("experiment", "tokenizer"))
    assert resolve_stage(config_of(*words), words) == resolve_stage(config_of(*words[1:]), words[1:])  # fmt: skip


def test_an_experiment_for_another_kind_of_tokenizer_is_refused(stages, photos):
    words = second_words(stages, photos)
    kinds = {"titok_tiny": "TiTok", "one_d_piece_tiny": "OneDPiece"}
    own = words[0].partition("=")[2]
    (other,) = kinds.keys() - {own}
    message = (
        f"^experiment={other}: is for a {kinds[other]}, but stage=decoder trains the {kinds[own]} "
        f"of stage.weights={stages[1]}; choose"
    )
    words[0] = f"experiment={other}"
    with pytest.raises(ConfigError, match=message):
        resolve_stage(config_of(*words), words)
    found = resolve_stage(config_of(*words), words[1:])  # nobody asked for it
    assert found["tokenizer"]["_target_"] == own.removesuffix("_tiny")
    words[0] = f"tokenizer={other}"
    with pytest.raises(
        ConfigError, match=rf"^tokenizer={other}: stage=decoder takes tokenizer\._target_="
    ):
        resolve_stage(config_of(*words), words)


@pytest.mark.parametrize("word", ["data.channels=1", "data.image_size=32"])
def test_second_stage_refuses_images_of_another_shape(stages, photos, word):
    words = [*second_words(stages, photos), word]
    with pytest.raises(ConfigError, match=r"^stage\.weights=.*: takes 3 x \(16, 16\) images, but"):
        resolve_stage(config_of(*words), words)


def test_first_stage_refuses_what_the_proxy_decides(proxy_run, photos):
    words = [*WORDS, *data_words(photos), "stage=proxy", f"stage.proxy={proxy_run}"]
    with pytest.raises(ConfigError, match=r"^stage=proxy: .*; .* add experiment=titok_tiny$"):
        resolve_stage(config_of(*words), words)
    words += ["experiment=titok_tiny"]
    resolve_stage(config_of(*words), [*words, "tokenizer.decoder.patch_size=8"])
    words += ["tokenizer.decoder.patch_size=4"]
    with pytest.raises(ConfigError, match=r"stage=proxy takes tokenizer\.decoder\.patch_size=8"):
        resolve_stage(config_of(*words), words)


def test_the_command_for_paper_size_is_the_published_recipe():
    """TiTok's stage 2: 500 k steps of 256 images, warm-up over 5 k, betas of 0.9 and 0.999."""
    lines = (CONFIGS / "stage/titok_decoder.yaml").read_text().splitlines()
    command = "".join(line.lstrip("# ") for line in lines if line.startswith("#   "))
    words = [w for w in shlex.split(command.replace("\\", " ")) if "<" not in w][1:]
    config = config_of(*words)
    assert config["stage"]["name"] == "decoder"
    optimizer, trainer = config["optimizer"], config["trainer"]
    assert optimizer["betas"] == [0.9, 0.999] and optimizer["lr"] == 1e-4
    assert optimizer["warmup_samples"] == 5000 * trainer["global_batch_size"] == 5000 * 256
    assert trainer["max_steps"] == 500000 and optimizer["total_samples"] is None
    assert optimizer["lr"] * optimizer["final_lr_factor"] == pytest.approx(1e-5)


def test_the_words_of_the_command_line_are_heard(stages, photos, fails):
    words = [*second_words(stages, photos), "hydra.run.dir=run", "tokenizer.decoder.depth=3"]
    fails("train", *words, words=("tokenizer.decoder.depth=3: stage=decoder takes", "leave it out"))  # fmt: skip
    assert not Path("run").exists()


@pytest.mark.slow
def test_the_same_command_goes_on(stages, photos, proxy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*second_words(stages, photos), "resume=auto", "trainer.val_check_interval=1"]
    sources = {"stage=proxy": [f"stage.proxy={proxy_run}", "stage.weights=null"], "stage=decoder": []}  # fmt: skip
    for stage, source in sources.items():
        for steps in (2, 3):
            more = [stage, *source, f"hydra.run.dir={stage[6:]}", f"trainer.max_steps={steps}"]
            assert train([*words, *more]) == 0
        assert [r["step"] for r in metrics_of(tmp_path / stage[6:]) if r.get("loss/total")] == ["1", "2", "3"]  # fmt: skip


# ---------------------------------------------------------------------- freezing itself


def test_frozen_parts_stay_in_eval_mode():
    tok = tiny_tokenizer()
    tok.freeze("encoder", "quantizer")
    tok.train()
    assert tok.training and tok.decoder.training and tok.decoder.transformer.training
    assert not any(m.training for m in (*tok.encoder.modules(), *tok.quantizer.modules()))
    state = {name: value.clone() for name, value in tok.quantizer.state_dict().items()}
    output = tok(tok.to_model_range(images_of(4)))
    assert not output.quantizer.losses
    assert all(torch.equal(v, state[k]) for k, v in tok.quantizer.state_dict().items())
    tok = tiny_tokenizer().train()
    assert tok(tok.to_model_range(images_of(4))).quantizer.losses  # else this shows nothing


@pytest.mark.parametrize("name", ["titok_tiny", "one_d_piece_tiny"])
def test_the_codes_that_a_frozen_quantizer_chooses_are_counted(name):
    tok = tiny_tokenizer(tokenizer=name)
    tok.freeze("quantizer")
    images = tok.to_model_range(images_of(4))
    tok(images)
    tok.initialize(images)
    assert not tok.quantizer.usage.counts.any()  # of training alone
    tok.train()
    ids = tok(images).quantizer.indices
    assert torch.equal(tok.quantizer.usage.counts, ids.flatten().bincount(minlength=16))


def test_the_summary_of_the_second_stage_tells_the_usage(stages):
    import json

    summary = json.loads((stages[2] / "summary.json").read_text())
    assert summary["codebook_usage"] > 0 and summary["perplexity"] >= 1


def test_a_held_network_is_not_owned():
    owner = torch.nn.Module()
    owner.teacher = Frozen(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.9)))
    owner.own = torch.nn.Linear(2, 2)
    owner.train()
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert {n for n, _ in owner.named_parameters()} == {"own.weight", "own.bias"}
    assert EMA(owner, 0.9).shadow.keys() == {"own.weight", "own.bias"}
    x = torch.ones(3, 2, requires_grad=True)
    out = owner.teacher(x)
    assert not out.requires_grad and torch.equal(out, owner.teacher(x))  # no dropout either
    owner.double()
    assert owner.teacher.module[0].weight.dtype == torch.float64


def test_code_loss_closed_form():
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1] = math.log(3)
    target = torch.tensor([[1, 0, 0], [0, 0, 0]])
    loss = CodeLoss()(compared(logits, target, kind="logits", of="codes"))
    assert loss.item() == pytest.approx((math.log(2) + 5 * math.log(4)) / 6)


# ---------------------------------------------------------------------- what is refused


def test_stages_say_what_they_lack(fails, photos, proxy_run, finished_run):
    words = [*WORDS, *data_words(photos)]
    fails("train", *words, "stage=proxy", words=("stage.proxy: is missing", "2D tokenizer"))
    fails("train", *words, "stage=decoder", words=("stage.weights: is missing", "stage=proxy"))
    fails("train", *words, "stage=proxy", f"stage.proxy={finished_run}", words="must be a 2D tokenizer")  # fmt: skip
    fails("train", *words, "stage=decoder", f"stage.weights={finished_run}", words="is not a run of stage=proxy")  # fmt: skip
    fails("train", *words, "stage=proxy", f"stage.proxy={proxy_run}", "data.image_size=32", words="data.image_size")  # fmt: skip
    fails("train", *words, "stage.frozen=[encodr]", words="stage.frozen: the tokenizer has no part encodr")  # fmt: skip
    fails("train", *words, "stage.frozen=encodr", words="the tokenizer has no part encodr")


@pytest.mark.parametrize(
    ("key", "chosen", "owner"),
    [
        ("proxy", "single", "proxy"),
        ("weights", "single", "decoder"),
        ("autoencoder", "single", "latents"),
        ("weights", "proxy", "decoder"),
        ("proxy", "decoder", "proxy"),
    ],
)
def test_a_source_without_its_stage_is_told(key, chosen, owner):
    message = rf"^stage\.{key} is set, but stage={chosen} does not read it; add stage={owner}$"
    with pytest.raises(ConfigError, match=message):
        resolve_stage(config_of(*WORDS, f"stage={chosen}", f"stage.{key}=runs/x"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["experiment=titok_tiny", "stage=proxy", "loss=mse"],
            r"^loss\.terms\.reconstruction\.of=image: ProxyDecoder predicts .*: codes \(logits\)",
        ),
        (["loss=proxy_codes"], r"^loss\.terms\.codes\.of=codes: Latent.*: image \(pixels\)"),
        (
            ["loss=proxy_codes", "loss.terms.codes.of=image"],
            r"^loss\.terms\.codes: CodeLoss compares logits, but .* as pixels; .*: .*mse",
        ),
    ],
)
def test_a_loss_that_does_not_fit_the_stage_is_told(words, message, proxy_run):
    words = [*words, f"stage.proxy={proxy_run}"] if "stage=proxy" in words else words
    with pytest.raises(ConfigError, match=message):
        Reconstruction(resolve_stage(config_of(*WORDS, *words)))


@pytest.mark.parametrize("frozen", ["['']", "['encoder.']", "[3]", "7", "[[encoder]]", "[null]"])
def test_frozen_must_name_parts(frozen):
    config = config_of(*TINY)
    config["stage"]["frozen"] = yaml.safe_load(frozen)
    with pytest.raises(ConfigError, match=r"^stage\.frozen: the tokenizer has no part "):
        Reconstruction(config)


def test_one_frozen_part_may_be_a_word():
    for frozen in ("encoder", "[encoder]"):
        module = Reconstruction(config_of(*TINY, f"stage.frozen={frozen}"))
        assert module.tokenizer.frozen == ("encoder",)
    assert not Reconstruction(config_of(*TINY, "stage.frozen=null")).tokenizer.frozen
