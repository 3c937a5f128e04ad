"""InfiniTransformer: a LLaMA-like decoder whose attention carries a compressive memory."""

import json
import math
import os
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from infini import checkpoint
from infini.attention import InfiniAttention, empty_memory
from infini.config import InfiniConfig
from infini.errors import InputError
from infini.layers.mlp import SwiGLU
from infini.layers.norm import RMSNorm
from infini.layers.rotary import rotary_table
from infini.local import announce_backend, choose_backend
from infini.memory import feature_size
from infini.segments import SegmentPlan
from infini.state import InfiniState, LayerState

KEEP = ("all", "last", "none")


class Block(nn.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(self, config: InfiniConfig, has_memory: bool):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = InfiniAttention(config, has_memory)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, state, plan, rotary, backend, use_memory, trace, maps) -> tuple[Tensor, LayerState]:
        attended, state = self.attention(self.attention_norm(x), state, plan, rotary, backend, use_memory, trace, maps)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state


class InfiniTransformer(nn.Module):
    """Decoder-only transformer with Infini-attention (arXiv:2404.07143).

    One call computes the parallel schedule: all segments of its tokens at once, layer by layer. Feeding a text segment by
    segment, or token by token, gives the same logits, because the state is all that crosses a border.

    Args:
        config: every choice.
        attention: backend of local attention: `auto`, `flash`, `sdpa` or `eager`; a property of the machine, not of the model.

    Example:
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=2, segment_length=4))
        >>> tokens = torch.randint(256, (1, 11))
        >>> whole, _ = model(tokens)
        >>> first, state = model(tokens[:, :6])
        >>> rest, _ = model(tokens[:, 6:], state)
        >>> torch.allclose(whole, torch.cat([first, rest], dim=1), atol=1e-5)  # any split of a text: the same logits
        True
    """

    def __init__(self, config: InfiniConfig, attention: str = "auto"):
        super().__init__()
        self.config, self.attention_backend = config, attention
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, has_memory) for has_memory in config.has_memory)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        state: InfiniState | None = None,
        *,
        reset: Tensor | None = None,
        padding: Tensor | None = None,
        keep: str = "all",
        hidden: bool = False,
        memory: bool = True,
        trace: dict | None = None,
        maps: dict | None = None,
    ) -> tuple[Tensor | None, InfiniState]:
        """Read `tokens` after `state`.

        Args:
            tokens: int `[batch, tokens]`, at least one. On a CUDA device the ids are not checked against the vocabulary.
            state: what an earlier call returned; None at the start of a text.
            reset: bool `[batch, tokens]`, True where a document begins: it sees nothing before, its segments begin anew.
            padding: bool `[batch, tokens]`, True where there is no token, anywhere in a row. It is left out before anything
                is computed, so it moves no segment border. Its logits are those of a hidden state of zeros.
            keep: `all` logits, those of each row's `last` token, or `none`.
            hidden: return the final normalised hidden states in place of logits.
            memory: False silences every memory (knock-out): the mix is as before the first write. It is written all the same.
            trace: receives `trace["layers"]`, one dict of detached statistics a layer (None without memory).
            maps: receives `maps["layers"]`, for each layer the map A `[batch, kv_heads, k, k]` that this call laid on its memory,
                M_after = A M_before + what was written; None is the identity (or no memory).

        Returns:
            Logits `[batch, tokens or 1, vocab]` (or hidden states `[..., hidden_size]`, or None), and the state after the last
            token. The state carries gradients; `state.detach()` cuts them.

        Raises:
            InputError: shapes, ids or the state do not fit.
        """
        if keep not in KEEP:
            raise InputError(f"keep is {keep!r}; choose one of {', '.join(KEEP)}")
        self._check(tokens, state, reset, padding)
        device = tokens.device
        lengths, place = None, None
        if padding is not None:
            tokens, reset, lengths, place = _leave_out(tokens, reset, padding)
        batch = tokens.shape[0]
        zeros = torch.zeros(batch, dtype=torch.long)
        plan = SegmentPlan(
            tokens=tokens.shape[1],
            segment_length=self.config.segment_length,
            span=self.config.span,
            sliding=self.config.local_attention == "sliding",
            open_length=zeros if state is None else state.open_length,
            tokens_seen=zeros if state is None else state.tokens_seen,
            empty=torch.ones(batch, dtype=torch.bool) if state is None else state.empty,
            history=0 if state is None else self.config.span - 1,
            lengths=lengths,
            reset=None if reset is None or not reset.any() else reset.cpu(),
            device=device,
        )
        x = self.embedding(tokens)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        backend = choose_backend(self.attention_backend, device.type, dtype)
        announce_backend(backend, device.type, dtype)
        rotary_dtype = torch.promote_types(torch.float32, x.dtype)
        rotary = rotary_table(plan.positions, self.config.head_dim, self.config.rope_theta, rotary_dtype)
        statistics = None if trace is None else []
        carried = []
        layers = []
        for block, old in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            # A list of its own for each block: the length of a shared one would make torch.compile compile every layer apart.
            received = None if maps is None else []
            arguments = (x, old, plan, rotary, backend, memory, statistics, received)
            if self._recompute and torch.is_grad_enabled():
                x, new = recompute(block, *arguments, use_reentrant=False)
            else:
                x, new = block(*arguments)
            layers.append(new)
            if maps is not None:
                carried.append(received[0])
        if trace is not None:
            # A copy: a recomputing backward pass runs the blocks again and appends once more.
            trace["layers"] = list(statistics)
        if maps is not None:
            maps["layers"] = carried
        state = InfiniState(tuple(layers), plan.open_length, plan.tokens_seen, plan.empty, self.state_shape)
        if keep == "none":
            return None, state
        if keep == "last":
            last = torch.full((batch,), tokens.shape[1]) if lengths is None else lengths
            x = x[torch.arange(batch, device=device), (last - 1).clamp(min=0).to(device)].unsqueeze(1)
            x = self.norm(x)
            if lengths is not None:
                x = x * (lengths > 0).to(device)[:, None, None]
        else:
            x = self.norm(x)
            if place is not None:
                # Back to where the tokens stood; padding gets zeros.
                x = x.gather(1, place.unsqueeze(-1).expand(-1, -1, x.shape[-1])) * ~padding.unsqueeze(-1)
        return (x if hidden else self.head(x)), state

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> InfiniState:
        """The state of `batch_size` streams that have read nothing; calling with None in its place gives the same."""
        config, like = self.config, self.embedding.weight
        device = like.device if device is None else torch.device(device)
        like = torch.empty(0, dtype=like.dtype, device=device)
        recent = (batch_size, config.span - 1, config.num_key_value_heads)
        layers = []
        for has_memory in config.has_memory:
            strength = None
            if has_memory and config.write_gate:
                strength = torch.zeros(recent, dtype=torch.promote_types(torch.float32, like.dtype), device=device)
            keys = like.new_zeros(*recent, config.head_dim)
            memory = empty_memory(config, batch_size, like) if has_memory else None
            layers.append(LayerState(keys, torch.zeros_like(keys), strength, memory))
        counters = (torch.zeros(batch_size, dtype=torch.long), torch.zeros(batch_size, dtype=torch.long))
        return InfiniState(tuple(layers), *counters, torch.ones(batch_size, dtype=torch.bool), self.state_shape)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state after `tokens` tokens: the same for any number of them.

        Per memory layer g (k v + k) fp32 numbers (k features, v = head width; no `+ k` for `deltanet`); per layer
        2 g v (span - 1) numbers of recent keys and values, and g (span - 1) fp32 write strengths; 17 bytes of counters.
        """
        config = self.config
        groups, width, recent = config.num_key_value_heads, config.head_dim, config.span - 1
        number = self.embedding.weight.element_size()
        full = max(4, number)
        features = feature_size(width, config.feature_map)
        memory = full * groups * features * (width + (config.update_rule != "deltanet"))
        strength = full * groups * recent * config.write_gate
        layers, with_memory = config.num_hidden_layers, sum(config.has_memory)
        return batch_size * (layers * 2 * number * groups * width * recent + with_memory * (memory + strength) + 17)

    @property
    def state_shape(self) -> str:
        """What a state must agree in to be used with this model, as JSON."""
        config = self.config
        shape = {
            "layers": config.num_hidden_layers,
            "memory_layers": [i for i, has in enumerate(config.has_memory) if has],
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "features": feature_size(config.head_dim, config.feature_map),
            "segment_length": config.segment_length,
            "span": config.span,
            "update_rule": config.update_rule,
            "write_gate": config.write_gate,
        }
        return json.dumps(shape)

    def enable_recompute(self, on: bool = True) -> None:
        """Keep only each block's input in training and compute the rest again in the backward pass."""
        self._recompute = on

    def enable_compile(self) -> None:
        """Compile the blocks with `torch.compile` for any number of rows and segments; alike, they share their graphs."""
        # With gradient or without, from a state or not, in a gap or not, one row or segment or more: each is a graph of its
        # own. They are more than torch's limit of 8, beyond which blocks would run uncompiled, with no word but a warning.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.blocks:
            block.compile(dynamic=True)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Parameter names by how they are trained.

        `decay`: matrices. `no_decay`: norms. `memory`: gates, write gates, memory scales and biases, which have a learning
        rate of their own: published attempts at a matrix's rate report gates that hardly leave their start.
        """
        groups: dict[str, list[str]] = {"decay": [], "no_decay": [], "memory": []}
        own = ("beta", "write_gate", "query_scale", "query_bias", "key_scale", "key_bias", "read_norm")
        for name, parameter in self.named_parameters():
            if any(part in own for part in name.split(".")):
                groups["memory"].append(name)
            else:
                groups["decay" if parameter.dim() > 1 else "no_decay"].append(name)
        return groups

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors`.

        Args:
            folder: made if it is missing; files of the same names are replaced, each atomically.
            dtype: of the matrices; None keeps theirs. Vectors (norms, gates, scales) are few and stay as they are.
        """
        weights = self.state_dict()
        if self.config.tie_word_embeddings:
            del weights["head.weight"]
        if dtype is not None:
            weights = {name: w.to(dtype) if w.dim() > 1 and "write_gate" not in name else w for name, w in weights.items()}
        checkpoint.write(folder, self.config, weights)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
    ) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: a checkpoint folder.
            device: where to.
            dtype: of all parameters; None: float32.
            attention: backend of local attention.

        Raises:
            InputError: the folder is no checkpoint, is damaged, or its weights are not finite or of another configuration.
        """
        config = checkpoint.read_config(folder)
        with torch.device("meta"):
            model = cls(config, attention)
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
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise InputError(f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be integers [batch, tokens]")
        if tokens.numel() == 0:
            raise InputError(f"tokens are {list(tokens.shape)}; a call needs at least one row and one token")
        if tokens.device.type == "cpu":
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise InputError(f"token id {bad} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")
        for name, mask in (("reset", reset), ("padding", padding)):
            if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
                raise InputError(f"{name} is {mask.dtype} {list(mask.shape)}; it must be bool {list(tokens.shape)}")
        if reset is not None and padding is not None and bool((reset & padding).any()):
            raise InputError("reset is True at a padding; a document must begin at a token")
        if state is None:
            return
        if state.shape != self.state_shape:
            raise InputError(f"the state belongs to another model: it is {state.shape}, this model needs {self.state_shape}")
        if state.batch_size != tokens.shape[0]:
            raise InputError(f"the state has {state.batch_size} rows, tokens have {tokens.shape[0]}; use state.select(rows)")
        if state.device != tokens.device:
            raise InputError(f"the state is on {state.device}, tokens are on {tokens.device}; use state.to(device)")
        needed = torch.promote_types(torch.float32, self.embedding.weight.dtype)
        for memory in (layer.memory for layer in state.layers if layer.memory):
            if memory.matrix.dtype != needed:
                raise InputError(
                    f"the state's memory is {memory.matrix.dtype}; this model needs {needed}: a state goes on with a model of "
                    "the precision that made it, and a memory is never in 16 bit"
                )


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
