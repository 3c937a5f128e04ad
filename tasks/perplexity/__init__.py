"""Perplexity of whole documents, read once, the state carried."""
