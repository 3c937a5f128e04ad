"""The one door to transformers. `import infini.hf` registers the model with the Auto classes.

Tested with transformers 5.17 and 5.23. Where transformers is not installed the import works and registers nothing; a name of it then
says what to install.

Example:
    >>> import infini.hf
    >>> infini.hf.InfiniHFConfig(segment_length=64).model_type
    'infini'
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from infini.errors import InputError

if TYPE_CHECKING:
    from infini.hf.adapters import load_gates as load_gates
    from infini.hf.adapters import save_gates as save_gates
    from infini.hf.adapters import train_gates as train_gates
    from infini.hf.byte_tokenizer import InfiniByteTokenizer as InfiniByteTokenizer
    from infini.hf.cache import InfiniCache as InfiniCache
    from infini.hf.config import InfiniHFConfig as InfiniHFConfig
    from infini.hf.keep_gates import KeepGates as KeepGates
    from infini.hf.model import InfiniForCausalLM as InfiniForCausalLM

# Public names and the modules they live in, which import transformers.
_HOMES = {
    "InfiniByteTokenizer": "byte_tokenizer",
    "InfiniCache": "cache",
    "InfiniForCausalLM": "model",
    "InfiniHFConfig": "config",
    "KeepGates": "keep_gates",
    "load_gates": "adapters",
    "save_gates": "adapters",
    "train_gates": "adapters",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'infini.hf' has no attribute {name!r}")
    if not _has_transformers():
        raise InputError(f"infini.hf.{name} needs transformers; install it with: pip install 'infini-attention[hf]'")
    return getattr(importlib.import_module(f"infini.hf.{_HOMES[name]}"), name)


def _has_transformers() -> bool:
    try:
        return importlib.util.find_spec("transformers") is not None
    except ValueError:  # sys.modules["transformers"] is None: switched off
        return False


if _has_transformers():
    importlib.import_module("infini.hf.auto")
