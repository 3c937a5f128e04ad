"""State that goes on from step to step: back-propagation through time over texts without end, truncated between batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from infini.data.batch import Batch

_FILE = "stream-{}.safetensors"


class Streams:
    """The state at the end of the last batch of each stream, where the next one of that stream begins.

    A state was computed by the weights of the steps before: no gradient corrects it, and it is used as it is.

    Attributes:
        start: the state that the last batch began with; None: anew. For a probe of that batch.

    Example:
        >>> import torch
        >>> from infini import InfiniConfig, InfiniTransformer
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4))
        >>> text, streams = torch.zeros(1, 5, dtype=torch.long), Streams()
        >>> batch = Batch(text, text > 0, segments=1, stream=0)
        >>> for _ in range(3):
        ...     _, state = model(text[:, :-1], streams.begin(batch))
        ...     streams.end(batch, state)
        >>> state.tokens_seen.tolist()
        [12]
    """

    def __init__(self) -> None:
        self.start: Any = None
        self._ends: dict[int, Any] = {}

    def begin(self, batch: Batch) -> Any:
        """The state that a batch goes on from; None where its stream, or each of its texts, begins."""
        self.start = None if batch.stream is None else self._ends.get(batch.stream)
        return self.start

    def end(self, batch: Batch, state: Any) -> None:
        """Keep the state behind a batch of a stream.

        Args:
            batch: the batch that was read.
            state: of the protocol; None for a batch of no stream.
        """
        if batch.stream is not None:
            # A copy: the state may be a view into the activations of the whole batch, which it would keep alive.
            self._ends[batch.stream] = state.detach().clone()

    def tokens_seen(self, batch: Batch) -> int:
        """Tokens of the longest document so far in the stream of a batch; 0 for a batch of no stream."""
        return 0 if batch.stream is None else int(self._ends[batch.stream].tokens_seen.max())

    def save(self, folder: Path) -> None:
        """Write a file for each stream."""
        for stream, state in self._ends.items():
            state.save(folder / _FILE.format(stream))

    def load(self, folder: Path, model: nn.Module) -> None:
        """Take up, on the device of ``model``, what `save` wrote."""
        for path in folder.glob(_FILE.format("*")):
            device = next(model.parameters()).device
            self._ends[int(path.stem.removeprefix("stream-"))] = model.state_class.load(path, device)
