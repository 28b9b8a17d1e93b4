"""ResTok."""
