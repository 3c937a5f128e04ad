"""The one door to transformers."""
