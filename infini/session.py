"""Read a text without end and write on, in memory that does not grow."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from infini.errors import InputError
from infini.protocol import SegmentModel
from infini.tensor_file import write_tensors


class StreamingSession:
    """A batch of streams that are read and continued, over any model of the protocol.

    Args:
        model: a model of the protocol; put it in evaluation mode first.
        batch_size: streams.
        state: a state to go on from, which is not changed; None starts anew.
        piece: most tokens per row of one forward pass. Peak memory depends on this, not on the text.

    Example:
        >>> from infini import InfiniConfig, InfiniTransformer
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4)).eval()
        >>> whole, bit_by_bit = StreamingSession(model), StreamingSession(model, piece=3)
        >>> torch.allclose(whole.feed([1, 2, 3, 4, 5, 6, 7]), bit_by_bit.feed([1, 2, 3, 4, 5, 6, 7]), atol=1e-5)
        True
    """

    def __init__(self, model: SegmentModel, batch_size: int = 1, state=None, piece: int = 4096):
        if piece < 1:
            raise InputError(f"piece is {piece}; a forward pass needs at least 1 token")
        self.model, self.piece = model, piece
        self.state = model.init_state(batch_size) if state is None else state
        self.batch_size = self.state.batch_size
        self._logits: Tensor | None = None
        self._seen = torch.zeros(self.batch_size, dtype=torch.long)
        if state is not None:
            self._seen += state.tokens_seen

    @property
    def tokens_seen(self) -> int:
        """Tokens read and written so far, of the longest row."""
        return int(self._seen.max())

    @property
    def state_bytes(self) -> int:
        """Bytes of the state."""
        return self.state.nbytes

    @torch.no_grad()
    def feed(
        self,
        ids: Sequence[int] | Tensor,
        padding: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Read tokens and return the logits after the last one.

        Args:
            ids: token ids `[tokens]` (for a batch of one) or `[batch, tokens]`; best on the CPU, pieces are moved to the model.
            padding: bool like `ids`, True where there is no token.
            progress: called with the tokens per row read so far, after each piece.

        Returns:
            fp32 logits `[batch, vocab]`; of a row that got no token, those it had before.

        Raises:
            InputError: no tokens, ids outside the vocabulary, or a batch of another size.
        """
        ids = torch.as_tensor(ids)
        if ids.dim() == 1:
            ids = ids.unsqueeze(0)
        if ids.numel() == 0:
            raise InputError("the text is empty; feed at least one token")
        if ids.dim() != 2 or len(ids) != self.batch_size:
            raise InputError(f"ids are {list(ids.shape)}; this session has {self.batch_size} rows: [batch, tokens]")
        low, high = int(ids.min()), int(ids.max())
        if ids.is_floating_point() or low < 0 or high >= self.model.config.vocab_size:
            raise InputError(
                f"ids are {ids.dtype} from {low} to {high}; they must be integers from 0 to {self.model.config.vocab_size - 1}"
            )
        device = self._device()
        lengths = torch.full((self.batch_size,), ids.shape[1])
        if padding is not None:
            if padding.shape != ids.shape or padding.dtype != torch.bool:
                raise InputError(f"padding is {padding.dtype} {list(padding.shape)}; it must be bool {list(ids.shape)}")
            # To the front once, so that the pieces of all rows are filled as far as they go.
            ids = ids.gather(1, padding.long().argsort(dim=1, stable=True))
            lengths = (~padding).sum(dim=1).cpu()
            if not bool(lengths.any()):
                raise InputError("the text is empty: every token is padding; feed at least one token")
        longest = int(lengths.max())
        for start in range(0, longest, self.piece):
            stop = min(start + self.piece, longest)
            piece = _moved(ids[:, start:stop], device)
            left_out = torch.arange(start, stop) >= lengths[:, None]
            mask = left_out.to(device) if bool(left_out.any()) else None
            logits, self.state = self.model(piece, self.state, padding=mask, keep="last")
            logits = logits[:, 0].float()
            if mask is not None and self._logits is not None:
                logits = torch.where((lengths > start).to(device)[:, None], logits, self._logits)
            self._logits = logits
            if progress is not None:
                progress(stop)
        self._seen += lengths
        return self._logits

    def generate(
        self,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_ids: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue every stream; yields the new tokens `[batch]`, int64 on the CPU, one step at a time.

        Each token is fed before it is yielded, so the session can be saved or fed on after any of them.

        Args:
            max_new_tokens: at most so many steps.
            temperature: 0 takes the likeliest token, otherwise logits are divided by it and sampled.
            top_k: sample among the k likeliest.
            top_p: sample among the fewest tokens whose probabilities reach p.
            stop_ids: a row that yields one of these is done: it is fed no more and repeats that id; all rows done ends.
            generator: source of randomness, on the model's device.

        Raises:
            InputError: nothing was fed yet, or a setting is out of its range.
        """
        if self._logits is None:
            raise InputError("nothing was fed to this session; feed a prompt of at least one token before generating")
        if max_new_tokens < 0 or temperature < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens} and temperature {temperature}; neither may be negative")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}; it must be at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")
        return self._generate(max_new_tokens, temperature, top_k, top_p, torch.tensor(list(stop_ids)), generator)

    def _generate(self, max_new_tokens, temperature, top_k, top_p, stop_ids, generator) -> Iterator[Tensor]:
        done = torch.zeros(self.batch_size, dtype=torch.bool)
        token = torch.zeros(self.batch_size, dtype=torch.long)
        for _ in range(max_new_tokens):
            chosen = choose_token(self._logits, temperature, top_k, top_p, generator).cpu()
            token = torch.where(done, token, chosen)
            self.feed(token.unsqueeze(1), padding=done.unsqueeze(1) if bool(done.any()) else None)
            done = done | torch.isin(token, stop_ids)
            yield token
            if bool(done.all()):
                return

    def save(self, path: str | os.PathLike) -> None:
        """Write the state and the last logits, so that `restore` goes on as if nothing had happened.

        Two files: `path` is the state (`StreamState.save`), `path` + `.next` what generation starts from.
        """
        self.state.save(path)
        logits = {} if self._logits is None else {"logits": self._logits}
        write_tensors(f"{os.fspath(path)}.next", logits | {"tokens_seen": self._seen})

    @classmethod
    def restore(cls, path: str | os.PathLike, model: SegmentModel, piece: int = 4096) -> Self:
        """Go on from what `save` wrote, on the device of `model`.

        Raises:
            InputError: the file is missing or damaged, or belongs to another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        device = next(model.parameters()).device
        state = model.state_class.load(path, device)
        if state.shape != model.state_shape:
            raise InputError(f"{path} belongs to another model: it is {state.shape}, this model needs {model.state_shape}")
        try:
            rest = load_file(f"{os.fspath(path)}.next")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}.next cannot be read ({error}); it is written beside the state by save") from None
        session = cls(model, state=state, piece=piece)
        session._seen = rest["tokens_seen"]
        session._logits = rest["logits"].to(device) if "logits" in rest else None
        return session

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _moved(ids: Tensor, device: torch.device) -> Tensor:
    """The ids as int64 on the device; on their way to a GPU the host goes on, and its next kernels are queued in time."""
    ids = ids.long()
    if device.type == "cuda" and not ids.is_cuda:
        ids = ids.pin_memory()
    return ids.to(device, non_blocking=True)


def choose_token(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pick the next token `[batch]` from logits `[batch, vocab]`.

    Example:
        >>> logits = torch.tensor([[0.0, 3.0, 2.9]])
        >>> choose_token(logits, temperature=5.0, top_k=1).item()  # with one candidate, temperature changes nothing
        1
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    ordered, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = float("-inf")
    probability = ordered.softmax(dim=-1)
    if top_p is not None:
        # A token stays if the ones before it do not reach p yet; the first always stays.
        probability = probability * (probability.cumsum(dim=-1) - probability < top_p)
    picked = torch.multinomial(probability, 1, generator=generator)
    return order.gather(1, picked).squeeze(1)
