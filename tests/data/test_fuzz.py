"""Mutated inputs: refused in one line or accepted with what is in them; never anything else."""

import fuzz
import pytest


def test_whole_inputs_are_accepted(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "mutated", lambda data, rng: data)
    monkeypatch.setattr(fuzz, "tar_mutated", fuzz.tar_bytes)
    cases = [("tars", 1), ("tables", 1), ("manifests and lists", 0), ("manifests and lists", 4)]
    for case in cases:
        assert fuzz.outcome(*case, tmp_path)[0] == "accepted", case


@pytest.mark.slow
def test_a_slice_of_the_fuzz(tmp_path):
    counts, wrong = fuzz.fuzz(0.03, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert set(counts) == set(fuzz.CASES)


@pytest.mark.nightly
def test_the_whole_fuzz(tmp_path):
    counts, wrong = fuzz.fuzz(1.0, tmp_path)
    print(fuzz.table(counts))
    assert not wrong, "\n".join(wrong)
    assert sum(sum(count.values()) for count in counts.values()) >= 600
