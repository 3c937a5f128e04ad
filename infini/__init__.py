"""Infini-attention (arXiv:2404.07143): language models that read without end, in memory of a fixed size."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from infini.config import InfiniConfig as InfiniConfig
    from infini.errors import InputError as InputError
    from infini.loading import load as load
    from infini.model import InfiniTransformer as InfiniTransformer
    from infini.session import StreamingSession as StreamingSession
    from infini.state import InfiniState as InfiniState

# Public names and the modules they live in. They are imported when they are first used, so that `infini --help` needs no torch.
_HOMES = {
    "InfiniConfig": "config",
    "InfiniState": "state",
    "InfiniTransformer": "model",
    "InputError": "errors",
    "StreamingSession": "session",
    "load": "loading",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'infini' has no attribute {name!r}")
    return getattr(importlib.import_module(f"infini.{_HOMES[name]}"), name)
