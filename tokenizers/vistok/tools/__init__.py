"""Command-line tools next to training."""
