"""Any Hugging Face causal language model as a model of the protocol: its cache is the state."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from infini.decoder import check_masks
from infini.errors import InputError
from infini.hf.tokenizer import HuggingFaceTokenizer
from infini.protocol import Carried


def load_causal_lm(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[HuggingFaceCausalLM, HuggingFaceTokenizer]:
    """Loads a folder written by ``save_pretrained``, with its tokenizer; nothing is downloaded.

    Args:
        folder: holds config.json, weights and tokenizer files.
        device: where the weights go.
        dtype: of the weights; None = as saved.

    Returns:
        The model in eval mode and its tokenizer.

    Raises:
        InputError: transformers is not installed, or the folder does not hold such a model.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(
            "a Hugging Face model needs the transformers package; "
            "install it with: pip install 'infini-attention[hf]'"
        ) from None
    if not Path(folder, "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises its own, safetensors', json's and the system's
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{folder} is no causal language model that transformers can load: {first_line}"
        ) from error
    if model.config.model_type == "infini":
        raise InputError(f"{folder} is a checkpoint of this library; load it with infini.load, or give checkpoint= in place of hf=")
    return HuggingFaceCausalLM(model).to(device).eval(), HuggingFaceTokenizer(tokenizer)


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What the protocol asks of a configuration.

    Attributes:
        vocab_size: number of logits.
        segment_length: the window the model was made for. Nothing is cut at its borders.
    """

    vocab_size: int
    segment_length: int


@dataclass(frozen=True)
class HuggingFaceState:
    """The keys and values of all tokens so far; it grows with the text.

    A value, as every state of the protocol: :meth:`HuggingFaceCausalLM.forward` leaves it as it is.

    Attributes:
        cache: transformers' ``DynamicCache``.
        mask: bool ``[batch, tokens]``, True where the token was no padding.
    """

    cache: object
    mask: torch.Tensor

    @property
    def batch_size(self) -> int:
        return self.mask.shape[0]

    @property
    def tokens_seen(self) -> torch.Tensor:
        """int64 ``[batch]`` on the CPU, padding not counted."""
        return self.mask.sum(1).cpu()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in _tensors(layer))

    def detach(self) -> HuggingFaceState:
        return self._mapped(torch.Tensor.detach)

    def clone(self) -> HuggingFaceState:
        return self._mapped(torch.Tensor.clone)

    def to(self, device: torch.device | str) -> HuggingFaceState:
        return self._mapped(lambda tensor: tensor.to(device))

    def select(self, rows: torch.Tensor) -> HuggingFaceState:
        """The state of the rows with these indices, int64 ``[any]``."""
        return self._mapped(lambda tensor: tensor[rows.to(tensor.device)])

    def reset(self, where: torch.Tensor) -> HuggingFaceState:
        """Forgets the rows of ``where``, bool ``[batch]``: what they hold becomes padding."""
        kept = ~where.to(self.mask.device)
        return HuggingFaceState(self.cache, self.mask & kept[:, None])

    def _mapped(self, change) -> HuggingFaceState:
        cache = _copied(self.cache)
        for layer in cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = map(change, _tensors(layer))
                layer.device = layer.keys.device
        return HuggingFaceState(cache, change(self.mask))


class HuggingFaceCausalLM(nn.Module):
    """Fits a transformers model to the protocol.

    Positions count the real tokens of each row. Full attention has no state of fixed size:
    ``state_bytes`` grows with the text.

    Args:
        model: a ``PreTrainedModel`` with a language modelling head and an attention cache.

    Raises:
        InputError: a model whose cache is not made of keys and values alone (recurrent layers).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        self.model = model
        text = model.config.get_text_config(decoder=True)
        self._window = getattr(text, "max_position_embeddings", None)
        self.config = HuggingFaceConfig(text.vocab_size, self._window or 2**31)
        kinds = {type(layer) for layer in self._empty_cache().layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(
                f"this {text.model_type} model keeps more than keys and values ({names}); "
                "use a model with attention in every layer"
            )
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._token_floats = 2 * heads * head_dim
        self._layers = text.num_hidden_layers
        # A learned table of positions is a hard limit; other positions only grow unfamiliar.
        self._has_position_table = any(
            isinstance(module, nn.Embedding)
            and module is not model.get_input_embeddings()
            and self._window is not None
            and 0 <= module.num_embeddings - self._window <= 2  # OPT's table has two more
            for module in model.modules()
        )

    def init_state(self, batch_size: int, device: torch.device | str | None = None):
        """The state before any token."""
        device = device or self.model.device
        mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        return HuggingFaceState(self._empty_cache(), mask)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the cache after ``tokens`` tokens of every row."""
        return batch_size * self.carried(tokens).bytes

    def carried(self, tokens: int) -> Carried:
        """What crosses a border behind a row's first ``tokens`` tokens, any number: the cache."""
        kept = 0
        for layer in self._empty_cache().layers or [None] * self._layers:
            # Transformers keeps window - 1 tokens: the next one makes the window full.
            window = getattr(layer, "sliding_window", None)
            kept += tokens if window is None else min(tokens, window - 1)
        numbers = kept * self._token_floats
        return Carried(numbers, numbers * self.model.dtype.itemsize)

    def forward(
        self,
        tokens: torch.Tensor,
        state: HuggingFaceState | None = None,
        *,
        reset: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        keep: str = "all",
        hidden: bool = False,
        memory: bool = True,
        trace: dict | None = None,
    ):
        """Logits of the next tokens and the longer state; see :class:`infini.protocol.SegmentModel`.

        Raises:
            InputError: more tokens than a learned table of positions has, a document that starts
                in the middle of a piece, or ``memory=False`` (there is no memory to silence).
        """
        if not memory or trace is not None:
            raise InputError("a Hugging Face model has no compressive memory to silence or to trace")
        if keep not in ("all", "last", "none"):
            raise InputError(f'keep is {keep!r}; use "all", "last" or "none"')
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise InputError(
                f"token ids must be 0 to {self.config.vocab_size - 1}, "
                f"got {int(tokens.min())} to {int(tokens.max())}; use the model's own tokenizer"
            )
        check_masks(tokens, reset, padding)
        state = self.init_state(len(tokens), tokens.device) if state is None else state
        if state.batch_size != len(tokens):
            raise InputError(
                f"the state has {state.batch_size} rows, tokens have {len(tokens)}; they must agree"
            )
        if reset is not None:
            if reset[:, 1:].any():
                raise InputError(
                    "a Hugging Face model cannot start a document in the middle of a piece; "
                    "give one document per row"
                )
            state = state.reset(reset[:, 0])
        real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else ~padding
        mask = torch.cat([state.mask, real], 1)
        self._check_room(mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        cache = _copied(state.cache)
        all_real = bool(mask.all())
        output = self.model(
            input_ids=tokens,
            attention_mask=None if all_real else mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=hidden,
            # Without padding the last token is the same in every row, and one row of logits is enough.
            logits_to_keep=1 if keep == "none" or hidden or (keep == "last" and all_real) else 0,
        )
        state = HuggingFaceState(cache, mask)
        if keep == "none":
            return None, state
        result = output.hidden_states[-1] if hidden else output.logits
        if keep == "last" and result.shape[1] > 1:
            last = (real * torch.arange(real.shape[1], device=real.device)).argmax(1)
            result = result[torch.arange(len(result), device=result.device), last].unsqueeze(1)
        return result, state

    def _empty_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _check_room(self, mask: torch.Tensor) -> None:
        if self._has_position_table and mask.shape[1] > self._window:
            if (seen := int(mask.sum(1).max())) > self._window:
                raise InputError(
                    f"this model has a table of {self._window} positions and cannot read "
                    f"{seen} tokens; ask for lengths up to {self._window - 16}"
                )


def _tensors(layer) -> tuple[torch.Tensor, ...]:
    return (layer.keys, layer.values) if layer.is_initialized else ()


def _copied(cache):
    # Layers replace their tensors when they grow and never write into them, so that the copy may
    # share them and the state that was passed in stays what it was.
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
