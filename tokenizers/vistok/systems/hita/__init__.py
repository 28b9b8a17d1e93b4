"""Hita."""
