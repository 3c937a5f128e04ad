"""Everything that crosses a call: memories, recent keys and values, counters. A value, never hidden in a module.

A state belongs to a model's shape and to a batch; both are checked when it is used. Its size does not depend on the text.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infini.errors import InputError
from infini.memory import MemoryState
from infini.tensor_file import write_tensors


class LayerTensors:
    """What one layer carries on: a frozen dataclass whose fields are tensors `[batch, ...]`, or None."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A new state with `change` applied to every tensor."""
        return type(self)(**{name: change(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, absent ones left out."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        return cls(**named)


class StreamState:
    """What the states of all models do alike: frozen dataclasses with `layers`, counters and `shape`.

    A subclass is a frozen dataclass with the fields `layers` (a tuple of `layer_class`), one tensor `[batch]` on the CPU for
    each of `counters`, `tokens_seen` among them, and `shape`, the JSON that a model's `state_shape` must equal.
    """

    format: ClassVar[str]
    """What its file calls itself."""
    layer_class: ClassVar[type[LayerTensors]]
    counters: ClassVar[dict[str, int | bool]]
    """Names of the counters, and what they are at the start of a document."""

    layers: tuple[Any, ...]
    tokens_seen: Tensor
    shape: str

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.tokens_seen)

    @property
    def device(self) -> torch.device:
        """Where the layers' tensors are; the counters stay on the CPU."""
        return next(iter(self.layers[0].tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def reset(self, where: Tensor) -> Self:
        """A new state in which the rows of the bool tensor `where` `[batch]` are as at the start of a document."""
        given = f"{where.dtype} {list(where.shape)}" if isinstance(where, Tensor) else f"a {type(where).__name__}"
        if given != f"torch.bool [{self.batch_size}]":
            raise InputError(f"reset was given {given}; it must be bool [{self.batch_size}], one per row")
        here, there = where.cpu(), where.to(self.device)

        def cleared(x: Tensor) -> Tensor:
            return torch.where(there.reshape(-1, *[1] * (x.dim() - 1)), torch.zeros_like(x), x)

        return dataclasses.replace(
            self,
            layers=tuple(layer.map(cleared) for layer in self.layers),
            **{name: getattr(self, name).masked_fill(here, start) for name, start in self.counters.items()},
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
        here = rows.cpu()
        if here.dim() != 1 or here.dtype not in (torch.int32, torch.int64) or not bool(((here >= 0) & (here < self.batch_size)).all()):
            raise InputError(f"select was given {here.dtype} {here.tolist()}; it takes indices of rows, int64 from 0 to {self.batch_size - 1}")
        there = rows.to(self.device)
        return self._map(lambda x: x.index_select(0, there), lambda x: x.index_select(0, here))

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file; it appears whole or not at all (`OSError` on a full disk)."""
        write_tensors(path, self._tensors(), {"format": self.format, "shape": self.shape})

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
        if metadata.get("format") != cls.format:
            raise InputError(f"{path} holds {metadata.get('format')!r}, not {cls.format!r}; save one with state.save(path)")
        try:
            return cls._assemble(tensors, metadata["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged, tensors are missing or do not fit together ({error}); save the state again") from None

    @classmethod
    def _assemble(cls, tensors: dict[str, Tensor], shape: str) -> Self:
        """The inverse of `_tensors`; an error of some kind where one is missing or of another batch."""
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"rows differ: {rows}")
        counters = {name: tensors.pop(name).cpu() for name in cls.counters}
        for name, start in cls.counters.items():
            if counters[name].dtype != (torch.bool if isinstance(start, bool) else torch.int64):
                raise ValueError(f"{name} is {counters[name].dtype}")
        layers = []
        for i in range(1 + max(int(name.split(".")[0]) for name in tensors)):
            named = {name.split(".")[1]: t for name, t in tensors.items() if name.startswith(f"{i}.")}
            layers.append(cls.layer_class.from_tensors(named))
        return cls(layers=tuple(layers), shape=shape, **counters)

    def _map(self, change, count=lambda x: x) -> Self:
        counters = {name: count(getattr(self, name)) for name in self.counters}
        return dataclasses.replace(self, layers=tuple(layer.map(change) for layer in self.layers), **counters)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.tensors().items()}
        return named | {name: getattr(self, name) for name in self.counters}


@dataclass(frozen=True)
class LayerState(LayerTensors):
    """What one layer carries on.

    `keys` and `values` `[batch, span - 1, kv_heads, head_dim]` are the last tokens' before rotary positions, the newest at the
    end; the open segment is among them. `write_strength` `[batch, span - 1, kv_heads]` belongs to them (None without a write
    gate). `memory` is None in a layer without one. `inputs` `[batch, short_conv, hidden_size]` are the last of the short convolution
    (None without), zeros before the document's start.
    """

    keys: Tensor
    values: Tensor
    write_strength: Tensor | None
    memory: MemoryState | None
    inputs: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "LayerState":
        """A new state with `change` applied to every tensor."""
        memory = self.memory and MemoryState(*(x if x is None else change(x) for x in self.memory))
        strength, inputs = (None if x is None else change(x) for x in (self.write_strength, self.inputs))
        return LayerState(change(self.keys), change(self.values), strength, memory, inputs)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, absent ones left out."""
        named = {"keys": self.keys, "values": self.values, "write_strength": self.write_strength, "inputs": self.inputs}
        if self.memory is not None:
            named |= self.memory._asdict()
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "LayerState":
        """The inverse of `tensors`."""
        memory = MemoryState(named["matrix"], named.get("normalizer")) if "matrix" in named else None
        return cls(named["keys"], named["values"], named.get("write_strength"), memory, named.get("inputs"))


@dataclass(frozen=True)
class InfiniState(StreamState):
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

    format: ClassVar[str] = "infini-state-1"
    layer_class: ClassVar[type[LayerTensors]] = LayerState
    counters: ClassVar[dict[str, int | bool]] = {"open_length": 0, "tokens_seen": 0, "empty": True}

    layers: tuple[LayerState, ...]
    open_length: Tensor
    tokens_seen: Tensor
    empty: Tensor
    shape: str


def differences(found: str, needed: str) -> str:
    """In which fields two models' `state_shape` differ, for an error.

    Example:
        >>> differences('{"layers": 2, "span": 8}', '{"layers": 4, "span": 8}')
        'it has layers=2, this model layers=4'
    """
    one, other = json.loads(found), json.loads(needed)
    names = [name for name in one | other if one.get(name) != other.get(name)]
    told = (", ".join(f"{name}={fields.get(name)}" for name in names) for fields in (one, other))
    return "it has {}, this model {}".format(*told)
