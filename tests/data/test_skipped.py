"""The account of bad images: by cause, in a file, and when they are too many."""

import pytest
from data_helpers import encode, picture

from vistok.core.errors import DataError
from vistok.data.datamodule import VistokDataModule
from vistok.data.skipped import Skip, SkippedImages


def bad(number, cause="damaged"):
    return Skip(f"k{number}", f"x.tar: because {number}", cause)


def test_each_key_once_by_cause_and_in_the_file(tmp_path):
    account = SkippedImages()
    account.record([bad(1), bad(2), bad(1)], 8)
    account.file = tmp_path / "skipped.tsv"  # those met before are written too
    account.record([bad(2), bad(3, "not an image")], 8)
    assert dict(account.causes) == {"damaged": 2, "not an image": 1}
    assert account.file.read_text().splitlines() == [
        "k1\tdamaged\tx.tar: because 1",
        "k2\tdamaged\tx.tar: because 2",
        "k3\tnot an image\tx.tar: because 3",
    ]
    assert account.report().startswith("skipped 3 images: 2 damaged, 1 not an image; k1 (x.tar")
    assert account.met == 19


def test_an_account_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    account = SkippedImages()
    account.file = tmp_path / "nowhere" / "skipped.tsv"
    account.record([bad(1)], 8)
    account.record([bad(2)], 8)
    assert len(account) == 2 and caplog.text.count("cannot write") == 1


def test_the_share_is_judged_after_a_thousand_and_from_ten_on():
    account = SkippedImages(0.02)
    account.record([bad(n) for n in range(30)], 70)  # 30 %, but early
    account.record([], 880)
    with pytest.raises(
        DataError, match=r"^30 of 1000 images .* data.max_skipped_share=0.02 allows \(30 d"
    ):
        account.record([], 20)
    account = SkippedImages(0.001)
    account.record([bad(n) for n in range(9)], 5000)  # too few to tell
    account = SkippedImages(0.02)
    account.record([bad(n) for n in range(20)], 1000)  # below


def test_later_epochs_do_not_dilute():
    account = SkippedImages(0.1)
    account.total = 60
    for _ in range(16):
        account.record([bad(n) for n in range(12)], 60)
    with pytest.raises(DataError, match=r"12 of 60 images"):
        account.record([], 60)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops(photos, tmp_path, workers):
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        if number % 2:
            path.write_bytes(encode(picture(0))[:300] if number % 4 == 1 else b"hello")
    data = VistokDataModule(
        "folder", str(photos), str(photos), image_size=16, batch_size=50, num_workers=workers
    )
    data.setup()
    data.skipped.file = tmp_path / "skipped.tsv"
    with pytest.raises(
        DataError, match=r"^12 of 48 images .*6 (damaged|not an image), 6 "
    ) as error:
        for _ in data.train_dataloader():
            data.advance()
    assert "\n" not in str(error.value) and data.samples_seen >= 900
    assert len(data.skipped.file.read_text().splitlines()) == 12
    patient = VistokDataModule(
        "folder", str(photos), str(photos), image_size=16, batch_size=50, num_workers=0, max_skipped_share=1
    )  # fmt: skip
    for _ in patient.train_dataloader():
        patient.advance()
        if patient.samples_seen > 1500:
            break


def test_the_account_is_kept_and_goes_on(tmp_path):
    account = SkippedImages()
    account.record([bad(1), bad(2, "not an image")], 8)
    seen = SkippedImages()
    seen.load_state_dict(account.state_dict())
    seen.record([bad(9)], 5, training=False)  # a validation, which comes again
    assert seen.state_dict() == account.state_dict() and seen.met == 16 and len(seen) == 3
    again = SkippedImages()
    again.file = tmp_path / "skipped.tsv"
    again.load_state_dict(account.state_dict())
    assert again == account and again.causes == account.causes and again.met == 10
    again.record([bad(1), bad(3)], 8)  # one of them is known, and in the file of then
    assert len(again) == 3 and again.met == 19
    assert again.file.read_text() == "k3\tdamaged\tx.tar: because 3\n"
    assert again.state_dict()["images"][1] == ["k2", "x.tar: because 2", "not an image"]


@pytest.mark.parametrize(("ranks", "rank", "found"), [(2, 0, 1), (2, 1, 2), (3, 0, 3), (3, 1, 0)])
def test_each_rank_has_its_own_account(shards, monkeypatch, ranks, rank, found):
    from vistok.core import ranks as distributed

    datamodule = VistokDataModule("shards", f"{shards}/*.tar", image_size=16, num_workers=0)
    datamodule.setup("fit")
    state = datamodule.state_dict()
    assert state["skipped"] == [{"met": 0, "images": []}]
    accounts = [SkippedImages(), SkippedImages()]
    accounts[0].record([bad(1)], 4)
    accounts[1].record([bad(2), bad(3)], 4)
    state["skipped"] = [account.state_dict() for account in accounts]
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    datamodule.load_state_dict(state)
    assert len(datamodule.skipped) == found
    assert datamodule.skipped.met == {1: 5, 2: 6, 3: 11, 0: 0}[found]
