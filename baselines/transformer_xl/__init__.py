"""Transformer-XL (arXiv:1901.02860)."""
