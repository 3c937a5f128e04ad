"""Tokens on their way to a model: tokenizer, batch, loader.

The names are resolved on first use, so that a tokenizer can be had without importing torch.
"""

from importlib import import_module

_HOME = {
    "Batch": "infini.data.batch",
    "ByteTokenizer": "infini.data.tokenizer",
    "Gap": "infini.data.batch",
    "load_batches": "infini.data.loader",
    "load_tokenizer": "infini.data.tokenizer",
}

__all__ = ["Batch", "ByteTokenizer", "Gap", "load_batches", "load_tokenizer"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
