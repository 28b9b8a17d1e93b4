"""scripts/gpu_check.py runs on a CPU at tiny size, so that a borrowed GPU is not spent on errors."""

import importlib.util
import json

import pytest

from helpers import CONFIGS, ROOT


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_all_sections_run(check, tmp_path, capsys):
    out = tmp_path / "check.json"
    assert check.main(["tiny=true", "device=cpu", f"out={out}"]) == 0, capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {row["precision"] for row in found["steps"]} == {"32", "bf16"}
    assert all(row["images_per_s"] > 0 for row in found["steps"] + found["encode"])
    assert [row["image_size"] for row in found["encode"]] == [32, 64]
    # On the CPU itself nothing may differ.
    assert all(row["ids_equal"] == 1 for row in found["agreement"])
    assert all(row["largest_difference"] == 0 for row in found["agreement"])
    assert found["attention"][0]["dense_ms"] > 0


def test_what_is_asked_for_exists(check, capsys):
    presets = [*check.DEFAULTS["presets"].split(","), *check.TINY_PRESETS.split(",")]
    assert all((CONFIGS / "experiment" / f"{name}.yaml").is_file() for name in presets)
    assert set(check.DEFAULTS["sections"].split(",")) == set(check.SECTIONS)
    assert check.main(["precision=32"]) == 2 and "expected one of" in capsys.readouterr().err


def test_a_section_that_fails_does_not_cost_the_others(check, tmp_path, monkeypatch, capsys):
    def broken(settings, clock):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(check, "SECTIONS", {"steps": broken, "encode": lambda *_: [{"a": 1}]})
    out = tmp_path / "check.json"
    assert check.main(["device=cpu", "sections=steps,encode", f"out={out}"]) == 1
    found = json.loads(out.read_text())
    assert found["steps_error"] == "RuntimeError: no kernel image" and found["encode"] == [{"a": 1}]
