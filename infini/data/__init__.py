"""Tokens on their way to a model: documents, tokenizers, batches, loader.

The names are resolved on first use, so that a tokenizer can be had without importing torch.
"""

from importlib import import_module

_HOME = {
    "BPETokenizer": "infini.data.bpe",
    "Batch": "infini.data.batch",
    "ByteTokenizer": "infini.data.tokenizer",
    "Gap": "infini.data.batch",
    "load_batches": "infini.data.loader",
    "load_tokenizer": "infini.data.tokenizer",
    "read_documents": "infini.data.documents",
    "tokenize": "infini.data.tokenized",
    "train_bpe": "infini.data.bpe",
}

__all__ = [
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "Gap",
    "load_batches",
    "load_tokenizer",
    "read_documents",
    "tokenize",
    "train_bpe",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
