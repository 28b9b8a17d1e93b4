"""The page that shows a measurement."""
