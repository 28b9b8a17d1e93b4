"""The checkpoint format: write, seal, find, read and migrate."""
