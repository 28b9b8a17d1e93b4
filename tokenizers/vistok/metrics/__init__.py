"""Metrics of reconstructions."""
