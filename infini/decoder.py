"""What every decoder of the protocol does alike: check the input, leave out padding, keep what is asked for, save and load."""

import functools
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from infini import checkpoint
from infini.compiled import Part, compile_parts
from infini.config import ModelConfig
from infini.device import require_device
from infini.errors import InputError
from infini.layers.cross_entropy import HELD_LOGITS, losses_of, token_losses
from infini.layers.norm import RMSNorm
from infini.local import BACKENDS
from infini.state import StreamState, differences

KEEP = ("all", "last", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Decoder(nn.Module, ABC):
    """Embedding, blocks, norm and head. A model is a subclass that says how its blocks are walked (`_read`).

    Args:
        config: every choice; has the fields that this class reads, under the names of `InfiniConfig`.
        make_block: builds the block of a layer, by its index.
        attention: backend of attention: `auto`, `flash`, `sdpa` or `eager`; a property of the machine, not of the model.

    Attributes:
        loss_tokens: tokens whose logits are held at a time while losses are computed; None: as many as make 2^26 logits.

    Raises:
        InputError: there is no such backend. Whether it can run is known when it is called.
    """

    config_class: ClassVar[type[ModelConfig]]
    state_class: ClassVar[type[StreamState]]
    memory_parameters: ClassVar[tuple[str, ...]] = ()
    """Parts of the names of parameters with a learning rate of their own."""

    def __init__(self, config: Any, make_block: Callable[[int], nn.Module], attention: str = "auto"):
        super().__init__()
        if attention not in BACKENDS:
            raise InputError(f"attention is {attention!r}; choose one of {', '.join(BACKENDS)}")
        self.config, self.attention_backend = config, attention
        self.loss_tokens: int | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(make_block(layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.losses = Part(losses_of, (), (0,), (0,))
        self._recompute = False
        self._initialize()
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self) -> None:
        """Normal weights; those that end a residual branch are smaller by sqrt(2 layers), as in GPT-2."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                ends_branch = name.endswith(("o_proj", "down_proj"))
                scale = math.sqrt(2 * self.config.num_hidden_layers) if ends_branch else 1.0
                nn.init.normal_(module.weight, std=std / scale)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        state: StreamState | None = None,
        *,
        reset: Tensor | None = None,
        padding: Tensor | None = None,
        keep: str = "all",
        hidden: bool = False,
        targets: Tensor | None = None,
        memory: bool = True,
        trace: dict | None = None,
    ) -> tuple[Tensor | None, StreamState]:
        """Read `tokens` after `state`.

        Args:
            tokens: int64 or int32 `[batch, tokens]`, at least one. On a CUDA device no ids are checked against the vocabulary.
            state: what an earlier call returned; None at the start of a text.
            reset: bool `[batch, tokens]`, True where a document begins: it sees nothing before, its segments begin anew.
            padding: bool `[batch, tokens]`, True where there is no token, anywhere in a row. It is left out before anything
                is computed, so it moves no segment border. Its logits are those of a hidden state of zeros.
            keep: `all` logits, those of each row's `last` token, or `none`.
            hidden: return the final normalised hidden states in place of logits.
            targets: like `tokens`, the token that is to follow each; its loss is returned in place of logits, and logits of
                `loss_tokens` tokens at a time are all that exist. Padding has loss 0, whatever its target.
            memory: False silences the model's memory (knock-out); what that is, the model says.
            trace: receives `trace["layers"]`, one dict of detached statistics a layer (None without memory).

        Returns:
            Logits `[batch, tokens or 1, vocab]` (or hidden states `[..., hidden_size]`, losses `[batch, tokens]` in nats, or None),
            and the state after the last token. The state carries gradients; `state.detach()` cuts them.

        Raises:
            InputError: shapes, ids or the state do not fit.
        """
        return self._forward(tokens, state, reset, padding, keep, hidden, targets, memory=memory, trace=trace)

    def _forward(self, tokens, state, reset, padding, keep, hidden, targets, **options) -> tuple[Tensor | None, StreamState]:
        if keep not in KEEP:
            raise InputError(f"keep is {keep!r}; choose one of {', '.join(KEEP)}")
        self._check(tokens, state, reset, padding)
        if targets is not None:
            if keep != "all" or hidden or targets.shape != tokens.shape:
                raise InputError(
                    f"targets are {list(targets.shape)} for tokens {list(tokens.shape)}, with keep={keep!r} and hidden={hidden}; losses "
                    "are of all tokens: give a target for each, and neither keep nor hidden"
                )
            # What stands at padding says nothing, and may be anything.
            targets = targets if padding is None else targets.masked_fill(padding, 0)
            self._check_ids("target", targets)
        lengths, place = None, None
        if padding is not None:
            tokens, reset, lengths, place = _leave_out(tokens, reset, padding)
        reset = None if reset is None or not reset.any() else reset.cpu()
        x, state = self._read(tokens, state, reset, lengths, **options)
        if keep == "none":
            return None, state
        if keep == "last" and lengths is None:
            x = self._finish(x[:, -1:])
        elif keep == "last":
            x = x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0).to(x.device)].unsqueeze(1)
            x = self._finish(x) * (lengths > 0).to(x.device)[:, None, None]
        else:
            x = self._finish(x)
            if place is not None:
                # Back to where the tokens stood; padding gets zeros.
                x = x.gather(1, place.unsqueeze(-1).expand(-1, -1, x.shape[-1])) * ~padding.unsqueeze(-1)
        if targets is not None:
            at_once = max(1, HELD_LOGITS // self.config.vocab_size) if self.loss_tokens is None else self.loss_tokens
            losses = token_losses(x, targets.long(), self.head, at_once, self.losses)
            return (losses if padding is None else losses.masked_fill(padding, 0)), state
        return (x if hidden else self.head(x)), state

    @abstractmethod
    def _read(
        self, tokens: Tensor, state: StreamState | None, reset: Tensor | None, lengths: Tensor | None, **options
    ) -> tuple[Tensor, StreamState]:
        """Walk the blocks.

        Args:
            tokens: int `[batch, tokens]`; each row's real tokens come first.
            state: fits the model and the batch; None at the start of a text.
            reset: bool `[batch, tokens]` on the CPU; None: no document begins.
            lengths: int64 `[batch]` on the CPU, real tokens of each row; None: all.
            options: `memory`, `trace` and what else the model's `forward` takes.

        Returns:
            What the last block gives, `[batch, tokens, hidden_size]`, and the new state.
        """

    def _finish(self, x: Tensor) -> Tensor:
        """From what the last block gives to what the head reads."""
        return self.norm(x)

    def _run(self, block: nn.Module, *arguments) -> Any:
        """A block's result; with recomputation only its input is kept for the backward pass."""
        if self._recompute and torch.is_grad_enabled():
            return recompute(block, *arguments, use_reentrant=False)
        return block(*arguments)

    @functools.cached_property
    def state_shape(self) -> str:
        """What a state must agree in to be used with this model, as JSON: all of its configuration that takes part in computing."""
        fields = {name: value for name, value in self.config.to_dict().items() if name not in ("tokenizer", "initializer_range")}
        return json.dumps({"model": self.config.model_type} | fields)

    def enable_recompute(self, on: bool = True) -> None:
        """Keep only each block's input in training and compute the rest again in the backward pass."""
        self._recompute = on

    def enable_compile(self) -> None:
        """Compile every `infini.compiled.Part` of the blocks, and the losses, for any number of rows, tokens and segments, with `torch.compile`.

        They are what comes before and after attention: short convolution, projections, rotary positions, and from the sum behind
        attention to the block's end; and what is done to logits. There is what a compiler can fuse. Local attention and memory stay
        as they are: fast ones are kernels that it could not look into, and they depend on plan and state, of which each kind would be
        a graph of its own.
        Blocks that are alike share their graphs.
        """
        # With gradient or without, one row or more, documents that begin inside or none, layers of several kinds: beyond torch's
        # limit of 8 graphs a part would run uncompiled, with no word but a warning.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        compile_parts(self)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Parameter names by how they are trained: `decay` (matrices), `no_decay` (norms), `memory` (a rate of their own)."""
        groups: dict[str, list[str]] = {"decay": [], "no_decay": [], "memory": []}
        for name, parameter in self.named_parameters():
            if any(part in self.memory_parameters for part in name.split(".")):
                groups["memory"].append(name)
            else:
                groups["decay" if parameter.dim() > 1 else "no_decay"].append(name)
        return groups

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors`.

        Args:
            folder: made if it is missing; files of the same names are replaced, each atomically.
            dtype: of the matrices; None keeps theirs. Vectors (norms, gates, scales) are few and stay as they are.

        Raises:
            InputError: `dtype` is no float, or too narrow for a weight.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype is {dtype}; weights can be saved in floats only, such as torch.float16 or torch.bfloat16")
        weights = self.state_dict()
        if self.config.tie_word_embeddings:
            del weights["head.weight"]
        if dtype is not None:
            of_memory = self.parameter_groups()["memory"]  # a scale for each head stands in two axes, and is no matrix
            narrowed = {name: w.to(dtype) for name, w in weights.items() if w.dim() > 1 and name not in of_memory}
            for name, w in narrowed.items():
                if bool((torch.isinf(w) & torch.isfinite(weights[name])).any()):
                    raise InputError(f"{name} has numbers too large for {dtype}; save with dtype=torch.bfloat16, or None to keep its own")
            weights |= narrowed
        checkpoint.write(folder, self.config, weights)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        **changes: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: a checkpoint folder.
            device: where to.
            dtype: of all parameters; None: float32.
            attention: backend of attention.
            changes: fields of the configuration that are to differ from the folder's; none that changes a weight's shape.

        Raises:
            InputError: the folder is no checkpoint, is damaged, or its weights are not finite or of another configuration; there is no
                such device or backend here; parameters cannot be of that dtype.
        """
        device = require_device(device)
        if dtype not in (None, *DTYPES):
            raise InputError(f"dtype is {dtype!r}; parameters are one of {', '.join(map(str, DTYPES))}")
        config = checkpoint.read_config(folder, cls.config_class)
        if changes:
            config = cls.config_class.from_dict(config.to_dict() | changes)
        with torch.device("meta"):
            model = cls(config, attention=attention)
        expected = model.state_dict()
        if config.tie_word_embeddings:
            del expected["head.weight"]
        weights = checkpoint.read_weights(folder, expected)
        weights = {name: w.to(device=device, dtype=dtype or torch.float32) for name, w in weights.items()}
        model.load_state_dict(weights, strict=False, assign=True)
        if config.tie_word_embeddings:
            model.head.weight = model.embedding.weight
        return model.eval()

    def _check(self, tokens, state, reset, padding) -> None:
        if not isinstance(tokens, Tensor):
            raise InputError(f"tokens are a {type(tokens).__name__}; they must be a tensor of integers [batch, tokens]")
        if tokens.dim() != 2:
            raise InputError(f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be integers [batch, tokens]")
        if tokens.numel() == 0:
            raise InputError(f"tokens are {list(tokens.shape)}; a call needs at least one row and one token")
        self._check_ids("token", tokens)
        check_masks(tokens, reset, padding)
        if state is not None:
            self._check_state(state, tokens)

    def _check_ids(self, what: str, ids: Tensor) -> None:
        if ids.dtype not in (torch.int32, torch.int64):
            raise InputError(f"{what}s are {ids.dtype} {list(ids.shape)}; they must be integers [batch, tokens], int64 or int32")
        if ids.device.type == "cpu":
            low, high = ids.min().item(), ids.max().item()
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise InputError(f"{what} id {bad} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")

    def _check_state(self, state: StreamState, tokens: Tensor) -> None:
        if not isinstance(state, self.state_class):
            raise InputError(f"the state is a {type(state).__name__}; {type(self).__name__} needs a {self.state_class.__name__}")
        if state.shape != self.state_shape:
            raise InputError(f"the state belongs to another model: {differences(state.shape, self.state_shape)}")
        if state.batch_size != tokens.shape[0]:
            raise InputError(f"the state has {state.batch_size} rows, tokens have {tokens.shape[0]}; use state.select(rows)")
        if state.device != tokens.device:
            raise InputError(f"the state is on {state.device}, tokens are on {tokens.device}; use state.to(device)")


def check_masks(tokens: Tensor, reset: Tensor | None, padding: Tensor | None) -> None:
    """Refuse masks that do not fit the tokens `[batch, tokens]`.

    Raises:
        InputError: another shape or dtype than bool, or a document that begins where there is no token.
    """
    for name, mask in (("reset", reset), ("padding", padding)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise InputError(f"{name} is a {type(mask).__name__}; it must be a tensor, bool {list(tokens.shape)}")
        if mask.shape != tokens.shape or mask.dtype != torch.bool:
            raise InputError(f"{name} is {mask.dtype} {list(mask.shape)}; it must be bool {list(tokens.shape)}")
    if reset is not None and padding is not None and bool((reset & padding).any()):
        raise InputError("reset is True at a padding; a document must begin at a token")


def _leave_out(tokens: Tensor, reset: Tensor | None, padding: Tensor):
    """Move the real tokens of each row to its front: tokens, reset, lengths (on the CPU), and each token's new place."""
    order = padding.long().argsort(dim=1, stable=True)
    lengths = (~padding).sum(dim=1).cpu()
    longest = max(1, int(lengths.max()))
    order = order[:, :longest]
    place = ((~padding).long().cumsum(dim=1) - 1).clamp(min=0)
    moved = None if reset is None else reset.gather(1, order)
    full = bool((lengths == longest).all())
    return tokens.gather(1, order), moved, None if full else lengths, place
