"""The engine: trainer, optimizers, averages, callbacks."""
