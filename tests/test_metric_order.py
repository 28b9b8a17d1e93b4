"""Degradations of the embedded photographs, and the metrics that put them in order."""

import importlib.util

import pytest
import torch

from helpers import ROOT, needs_hed, needs_lite0

LITE0 = {"_target_": "lite0"}
METRICS = {
    "psnr": {"_target_": "psnr"},
    "ssim": {"_target_": "ssim"},
    "hed_vgg": {"_target_": "perceptual", "network": {"_target_": "hed_vgg"}},
    "lite0": {"_target_": "perceptual", "network": LITE0},
    "fd_lite0": {"_target_": "frechet", "network": LITE0},
}

#: Which do not: docs/lab/metric_order.md says why.
FAIL = {("posterization, levels", "hed_vgg"), ("other images, %", "fd_lite0")}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("metric_order", ROOT / "scripts/metric_order.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_lite0
@needs_hed
@pytest.mark.slow
def test_packaged_metrics_order_what_everybody_would(script, monkeypatch):
    monkeypatch.setattr(script, "METRICS", METRICS)
    originals = script.photographs([], 12, 48)
    assert originals.shape == (12, 3, 48, 48)
    found = script.measure(originals)
    for title, (_, strengths) in script.DEGRADATIONS.items():
        for name in METRICS:
            if (title, name) in FAIL:
                continue
            values = [found[title, strength, name] for strength in strengths]
            higher = name in ("psnr", "ssim")
            assert script.rises(values, higher), (title, name, values)
            assert not script.rises(values[::-1], higher)


def test_degradations_are_what_they_are_called(script):
    images = script.photographs([], 8, 48)
    assert torch.equal(script.posterized(images, 256), images)
    assert set(script.posterized(images, 2).unique().tolist()) <= {0, 255}
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(script.blur(flat, 2.0), flat)
    assert torch.equal(script.smaller(flat, 4), flat)
    changed = (script.others(images, 25) != images).flatten(1).any(dim=1)
    assert changed.tolist() == [True, False, False, False] * 2
    assert (script.others(images, 100) != images).flatten(1).any(dim=1).all()
    assert script.rises([1.0, 2.0, 3.0], False) and not script.rises([1.0, 1.0], False)
    assert script.rises([3.0, 2.0], True) and not script.rises([1.0, 3.0, 2.0], False)


def test_the_table_says_which_metric_fails(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "METRICS", {name: METRICS[name] for name in ("psnr", "ssim")})
    degradations = {"JPEG quality": (script.jpeg, (50, 5)), "wrong way": (script.jpeg, (5, 50))}
    monkeypatch.setattr(script, "DEGRADATIONS", degradations)
    assert script.main(["--images", "4", "--size", "48"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| degradation | psnr | ssim |"
    assert "**no**" not in lines[4] and lines[5].count("**no**") == 2
