"""Recurrent Memory Transformer (arXiv:2207.06881)."""
