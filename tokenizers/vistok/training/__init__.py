"""The LightningModule, schedules, EMA and callbacks."""
