"""Tasks: the thing trained, its data, and the number that watches it."""
