"""The terms of the objective."""
