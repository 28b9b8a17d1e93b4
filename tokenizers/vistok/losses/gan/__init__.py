"""Adversarial terms."""
