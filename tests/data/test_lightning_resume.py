"""Lightning's own loop over our loader: a resume in mid-epoch neither skips nor repeats."""

import lightning as L
import pytest
import torch

from vistok.data.datamodule import VistokDataModule


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.log_, self.validated = [], 0

    def training_step(self, batch, index):
        images = batch["image"].float().div(255).mean((2, 3))
        loss = (images - self.weight).square().mean()
        self.log_.append((batch["index"].tolist(), float(loss.detach())))
        self.trainer.datamodule.advance()
        return loss

    def validation_step(self, batch, index):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(shards, folder, steps, workers, resume=None, save=None):
    datamodule = VistokDataModule(
        "shards", f"{shards}/*.tar", image_size=16, batch_size=8, num_workers=workers
    )
    model = Tiny()
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=datamodule, ckpt_path=resume, weights_only=False)
    if save:
        trainer.save_checkpoint(save)
    assert datamodule.samples_seen == steps * 8
    return model.log_


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("workers", "then"), [(0, 0), (2, 2), (2, 0)])
def test_resume_in_mid_epoch(shards, tmp_path, workers, then):
    steps = 11  # an epoch of 36 images is 4 steps long and does not divide
    whole = fit(shards, tmp_path, steps, workers)
    assert len(whole) == steps
    for stop in (2, 4, 7):  # in an epoch, at its end, in a later one
        first = fit(shards, tmp_path, stop, workers, save=tmp_path / "x.ckpt")
        second = fit(shards, tmp_path, steps, then, resume=tmp_path / "x.ckpt")
        assert first + second == whole
