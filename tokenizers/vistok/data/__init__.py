"""Shards, streams and transforms."""
