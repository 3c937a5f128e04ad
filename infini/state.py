"""Everything that crosses a call: memories, recent keys and values, counters. A value, never hidden in a module.

A state belongs to a model's shape and to a batch; both are checked when it is used. Its size does not depend on the text.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infini.errors import InputError
from infini.memory import MemoryState
from infini.tensor_file import write_tensors

FORMAT = "infini-state-1"


@dataclass(frozen=True)
class LayerState:
    """What one layer carries on.

    `keys` and `values` `[batch, span - 1, kv_heads, head_dim]` are the last tokens' before rotary positions, the newest at the
    end; the open segment is among them. `write_strength` `[batch, span - 1, kv_heads]` belongs to them (None without a write
    gate). `memory` is None in a layer without one.
    """

    keys: Tensor
    values: Tensor
    write_strength: Tensor | None
    memory: MemoryState | None

    def map(self, change) -> "LayerState":
        """A new state with `change` applied to every tensor."""
        memory = self.memory and MemoryState(*(x if x is None else change(x) for x in self.memory))
        strength = None if self.write_strength is None else change(self.write_strength)
        return LayerState(change(self.keys), change(self.values), strength, memory)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, absent ones left out."""
        named = {"keys": self.keys, "values": self.values, "write_strength": self.write_strength}
        if self.memory is not None:
            named |= self.memory._asdict()
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class InfiniState:
    """State of a batch of streams: a `LayerState` per layer and three counters per row.

    Attributes:
        layers: one `LayerState` per layer.
        open_length: int64 `[batch]`, on the CPU: tokens of the segment that is not full yet.
        tokens_seen: int64 `[batch]`, on the CPU: tokens since the document began.
        empty: bool `[batch]`, on the CPU: nothing has been written since the document began.
        shape: the model shape that it belongs to, see `InfiniTransformer.state_shape`.

    Example:
        >>> from infini import InfiniConfig, InfiniTransformer
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4))
        >>> _, short = model(torch.zeros(1, 9, dtype=torch.long))
        >>> _, long = model(torch.zeros(1, 900, dtype=torch.long))
        >>> short.nbytes == long.nbytes == model.state_bytes(900)  # a state does not grow with the text
        True
    """

    layers: tuple[LayerState, ...]
    open_length: Tensor
    tokens_seen: Tensor
    empty: Tensor
    shape: str

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.open_length)

    @property
    def device(self) -> torch.device:
        """Where the layers' tensors are; the counters stay on the CPU."""
        return self.layers[0].keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def reset(self, where: Tensor) -> Self:
        """A new state in which the rows of the bool tensor `where` `[batch]` are as at the start of a document."""
        if where.shape != (self.batch_size,) or where.dtype != torch.bool:
            raise InputError(
                f"reset was given {where.dtype} {list(where.shape)}; it must be bool [{self.batch_size}], one per row"
            )
        here, there = where.cpu(), where.to(self.device)

        def cleared(x: Tensor) -> Tensor:
            return torch.where(there.reshape(-1, *[1] * (x.dim() - 1)), torch.zeros_like(x), x)

        return dataclasses.replace(
            self,
            layers=tuple(layer.map(cleared) for layer in self.layers),
            open_length=self.open_length.masked_fill(here, 0),
            tokens_seen=self.tokens_seen.masked_fill(here, 0),
            empty=self.empty | here,
        )

    def detach(self) -> Self:
        """The same values without their history of gradients."""
        return self._map(Tensor.detach)

    def clone(self) -> Self:
        """A copy that shares no storage."""
        return self._map(Tensor.clone, Tensor.clone)

    def to(self, device: torch.device | str) -> Self:
        """The same state on another device."""
        return self._map(lambda x: x.to(device))

    def select(self, rows: Tensor) -> Self:
        """The rows of the int64 tensor `rows`, in its order; a row may occur several times."""
        there = rows.to(self.device)
        return self._map(lambda x: x.index_select(0, there), lambda x: x.index_select(0, rows.cpu()))

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file; it appears whole or not at all (`OSError` on a full disk)."""
        write_tensors(path, self._tensors(), {"format": FORMAT, "shape": self.shape})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, cut short, or no saved state.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read as a saved state ({error}); save one with state.save(path)") from None
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} holds {metadata.get('format')!r}, not {FORMAT!r}; save one with state.save(path)")
        counters = {name: tensors.pop(name).cpu() for name in ("open_length", "tokens_seen", "empty")}
        layers = []
        for i in range(json.loads(metadata["shape"])["layers"]):
            named = {name.split(".")[1]: t for name, t in tensors.items() if name.startswith(f"{i}.")}
            memory = MemoryState(named["matrix"], named.get("normalizer")) if "matrix" in named else None
            layers.append(LayerState(named["keys"], named["values"], named.get("write_strength"), memory))
        return cls(layers=tuple(layers), shape=metadata["shape"], **counters)

    def _map(self, change, count=lambda x: x) -> Self:
        counters = {name: count(getattr(self, name)) for name in ("open_length", "tokens_seen", "empty")}
        return dataclasses.replace(self, layers=tuple(layer.map(change) for layer in self.layers), **counters)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.tensors().items()}
        return named | {"open_length": self.open_length, "tokens_seen": self.tokens_seen, "empty": self.empty}
