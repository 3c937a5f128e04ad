"""The object that transformers carries from call to call, with an `InfiniState` inside."""

import copy
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from infini.errors import InputError
from infini.state import InfiniState


class InfiniCache(Cache):
    """An `InfiniState` under transformers' name `past_key_values`; its size does not depend on the text.

    The state is a value, this is the box that `generate` changes: `copy.copy(cache)` is a second box with the same state,
    and either goes on alone. So a text is read once and asked about many times.

    Args:
        state: to go on from, for example of a `StreamingSession` or of `InfiniState.load`; None: nothing was read.

    Attributes:
        state: the `InfiniState` of the tokens so far, or None.
        columns: tokens per row so far, padding counted, as transformers counts them.

    Example:
        >>> InfiniCache().get_seq_length()
        0
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: InfiniState | None = None):
        super().__init__(layers=[])
        self.state = state
        self.columns = 0 if state is None else int(state.tokens_seen.max())

    def __repr__(self) -> str:
        return f"InfiniCache(columns={self.columns}, nbytes={self.nbytes})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __copy__(self) -> Self:
        other = type(self)(self.state)
        other.columns = self.columns
        return other

    def __deepcopy__(self, memo: dict) -> Self:
        other = copy.copy(self)
        other.state = None if self.state is None else self.state.detach().clone()
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    def attention_mask(self, ids: Tensor) -> Tensor:
        """The mask that `generate(ids, past_key_values=cache)` asks for: all that was read, then `ids` without padding.

        Args:
            ids: the new tokens `[batch, tokens]`.

        Returns:
            int64 `[batch, columns + tokens]`, on the device of `ids`.
        """
        batch, tokens = ids.shape
        mask = torch.ones(batch, self.columns + tokens, dtype=torch.long, device=ids.device)
        if self.state is not None:
            if batch != self.state.batch_size:
                raise InputError(f"the cache has {self.state.batch_size} rows, ids have {batch}; use batch_repeat_interleave")
            # Where the padding stood is not kept, only how much there was; it moves nothing.
            place = torch.arange(self.columns, device=ids.device)
            mask[:, : self.columns] = place >= (self.columns - self.state.tokens_seen.to(ids.device))[:, None]
        return mask

    def advance(self, state: InfiniState, columns: int) -> None:
        """Replace the state by the one after `columns` more tokens."""
        self.state, self.columns = state, self.columns + columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row so far, padding counted."""
        return self.columns

    def get_max_length(self, layer_idx: int = 0) -> int:
        """-1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in their order; a row may occur several times."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, for several answers to one text."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """A memory does not forget its last tokens alone.

        Raises:
            InputError: always, unless nothing is to be cut.
        """
        if max_length < 0 or max_length < self.columns:
            raise InputError(
                f"crop({max_length}) of a cache that has read {self.columns} tokens: a memory cannot be cut back; "
                "keep copy.copy(cache) of the place to return to (assisted decoding is not possible)"
            )

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Another model's way to use a cache.

        Raises:
            InputError: always.
        """
        raise InputError("an InfiniCache belongs to InfiniForCausalLM; another model needs a cache of its own")
