"""InfiniTransformer: a LLaMA-like decoder whose attention carries a compressive memory."""

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from infini.attention import InfiniAttention, empty_memory
from infini.config import InfiniConfig, ModelConfig
from infini.decoder import Decoder
from infini.errors import InputError
from infini.kernels.choice import BACKENDS, choose_memory_backend
from infini.layers.block import Block
from infini.layers.rotary import rotary_table
from infini.local import announce_backend, choose_backend
from infini.memory import feature_size
from infini.protocol import Carried
from infini.segments import SegmentPlan
from infini.state import InfiniState, LayerState, StreamState


class InfiniTransformer(Decoder):
    """Decoder-only transformer with Infini-attention (arXiv:2404.07143).

    One call computes the parallel schedule: all segments of its tokens at once, layer by layer. Feeding a text segment by
    segment, or token by token, gives the same logits, because the state is all that crosses a border.

    Args:
        config: every choice.
        attention: backend of local attention: `auto`, `flash`, `sdpa` or `eager`; a property of the machine, not of the model.
        memory_backend: of the memory: `auto`, `triton` or `torch`, see `infini.kernels.choice`; a property of the machine too.

    Raises:
        InputError: there is no such backend. Whether it can run is known when it is called.

    Example:
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=2, segment_length=4))
        >>> tokens = torch.randint(256, (1, 11))
        >>> whole, _ = model(tokens)
        >>> first, state = model(tokens[:, :6])
        >>> rest, _ = model(tokens[:, 6:], state)
        >>> torch.allclose(whole, torch.cat([first, rest], dim=1), atol=1e-5)  # any split of a text: the same logits
        True
    """

    config_class: ClassVar[type[ModelConfig]] = InfiniConfig
    state_class: ClassVar[type[StreamState]] = InfiniState
    # Gates, write gates, memory scales and biases have a learning rate of their own: published attempts at a matrix's rate
    # report gates that hardly leave their start.
    memory_parameters: ClassVar[tuple[str, ...]] = (
        "beta", "write_gate", "query_scale", "query_bias", "key_scale", "key_bias", "read_norm",
    )

    def __init__(self, config: InfiniConfig, attention: str = "auto", memory_backend: str = "auto"):
        if memory_backend not in BACKENDS:
            raise InputError(f"memory_backend is {memory_backend!r}; choose one of {', '.join(BACKENDS)}")
        super().__init__(config, lambda layer: Block(config, InfiniAttention(config, config.has_memory[layer])), attention)
        self.memory_backend = memory_backend

    def forward(
        self,
        tokens: Tensor,
        state: InfiniState | None = None,
        *,
        reset: Tensor | None = None,
        padding: Tensor | None = None,
        keep: str = "all",
        hidden: bool = False,
        targets: Tensor | None = None,
        memory: bool = True,
        trace: dict | None = None,
        maps: dict | None = None,
    ) -> tuple[Tensor | None, InfiniState]:
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
            memory: False silences every memory (knock-out): the mix is as before the first write. It is written all the same.
            trace: receives `trace["layers"]`, one dict of detached statistics a layer (None without memory).
            maps: receives `maps["layers"]`, for each layer the map A `[batch, kv_heads, k, k]` that this call laid on its memory,
                M_after = A M_before + what was written; None is the identity (or no memory); and `maps["update_rule"]`.

        Returns:
            Logits `[batch, tokens or 1, vocab]` (or hidden states `[..., hidden_size]`, losses `[batch, tokens]` in nats, or None),
            and the state after the last token. The state carries gradients; `state.detach()` cuts them.

        Raises:
            InputError: shapes, ids or the state do not fit.
        """
        options = {"memory": memory, "trace": trace, "maps": maps}
        return self._forward(tokens, state, reset, padding, keep, hidden, targets, **options)

    def _read(self, tokens, state, reset, lengths, memory, trace, maps) -> tuple[Tensor, InfiniState]:
        device = tokens.device
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
            reset=reset,
            device=device,
        )
        x = self.embedding(tokens)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        backend = choose_backend(self.attention_backend, device.type, dtype, self.config.local_attention == "sliding")
        announce_backend(backend, device.type, dtype)
        memory_backend = choose_memory_backend(
            self.memory_backend,
            device,
            dtype,
            update_rule=self.config.update_rule,
            feature_map=self.config.feature_map,
            head_dim=self.config.head_dim,
            traced=trace is not None,
        )
        rotary_dtype = torch.promote_types(torch.float32, x.dtype)
        rotary = rotary_table(plan.positions, self.config.head_dim, self.config.rope_theta, rotary_dtype)
        statistics = None if trace is None else []
        carried = None if maps is None else []
        layers = []
        for block, old in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            x, new = self._run(block, x, old, plan, rotary, backend, memory, statistics, carried, memory_backend)
            layers.append(new)
        if trace is not None:
            # A copy: a recomputing backward pass runs the blocks again and appends once more.
            trace["layers"] = list(statistics)
        if maps is not None:
            maps.update(layers=list(carried), update_rule=self.config.update_rule)
        state = InfiniState(tuple(layers), plan.open_length, plan.tokens_seen, plan.empty, self.state_shape)
        return x, state

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
            inputs = like.new_zeros(batch_size, config.short_conv, config.hidden_size) if config.short_conv else None
            layers.append(LayerState(keys, torch.zeros_like(keys), strength, memory, inputs))
        counters = (torch.zeros(batch_size, dtype=torch.long), torch.zeros(batch_size, dtype=torch.long))
        return InfiniState(tuple(layers), *counters, torch.ones(batch_size, dtype=torch.bool), self.state_shape)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state after `tokens` tokens: the same for any number of them.

        Per memory layer g (k v + k) fp32 numbers (k features, v = head width; no `+ k` for `deltanet`); per layer
        2 g v (span - 1) numbers of recent keys and values, D short_conv of recent inputs, and g (span - 1) fp32 write
        strengths; 17 bytes of counters.
        """
        config = self.config
        groups, width, recent = config.num_key_value_heads, config.head_dim, config.span - 1
        number = self.embedding.weight.element_size()
        full = max(4, number)
        strength = full * groups * recent * config.write_gate
        layers, with_memory = config.num_hidden_layers, sum(config.has_memory)
        text = number * (2 * groups * width * recent + config.hidden_size * config.short_conv)
        return batch_size * (layers * text + full * self._memory_numbers + with_memory * strength + 17)

    def carried(self, tokens: int) -> Carried:
        """What crosses the border behind a row's first `tokens` tokens, a multiple of `segment_length`.

        Per memory layer g (k v + k) numbers of the memory M and z (g key/value heads, k features, v = head width; no `+ k` for
        `deltanet`): the paper's d_k (d_v + 1) H l. Sliding attention adds, per layer, 2 g v numbers for each of the last
        window - 1 tokens, a short convolution D for each of the last `short_conv`.

        Example:
            >>> model = InfiniTransformer(InfiniConfig.paper(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, segment_length=8))
            >>> model.carried(800).numbers == 3 * 4 * (16 * 16 + 16)
            True
        """
        config = self.config
        window = min(tokens, config.span - 1) if config.local_attention == "sliding" else 0
        text = 2 * config.num_key_value_heads * config.head_dim * window + config.hidden_size * min(tokens, config.short_conv)
        text *= config.num_hidden_layers
        memory = self._memory_numbers if tokens >= config.segment_length else 0
        number = self.embedding.weight.element_size()
        return Carried(text + memory, number * text + max(4, number) * memory)

    @property
    def _memory_numbers(self) -> int:
        """Of M and z, all layers of a row."""
        config = self.config
        features = feature_size(config.head_dim, config.feature_map)
        numbers = config.num_key_value_heads * features * (config.head_dim + (config.update_rule != "deltanet"))
        return numbers * sum(config.has_memory)

    @cached_property
    def _held(self) -> list[set[str]]:
        """The tensors that a state has, by layer."""
        return [set(layer.tensors()) for layer in self.init_state(1, "meta").layers]

    def _check_state(self, state: InfiniState, tokens: Tensor) -> None:
        super()._check_state(state, tokens)
        # A layer whose memory or recent inputs are lost would begin with empty ones.
        if [set(layer.tensors()) for layer in state.layers] != self._held:
            raise InputError("the state has lost layers or memories on its way; take it from a call of the model, or from its file anew")
        self.check_precision(state)

    def check_precision(self, state: InfiniState) -> None:
        """Refuse a state of another precision than this model's.

        Raises:
            InputError: its memories are of another dtype.
        """
        needed = torch.promote_types(torch.float32, self.embedding.weight.dtype)
        for memory in (layer.memory for layer in state.layers if layer.memory):
            if memory.matrix.dtype != needed:
                raise InputError(
                    f"the state's memory is {memory.matrix.dtype}; this model needs {needed}: a state goes on with a model of "
                    "the precision that made it, and a memory is never in 16 bit"
                )
