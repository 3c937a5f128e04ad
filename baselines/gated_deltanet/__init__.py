"""Gated DeltaNet layers with sliding-window attention between them (arXiv:2412.06464)."""
