"""Memorizing Transformers (arXiv:2203.08913)."""
