"""A decoder of Gated DeltaNet layers and sliding-window attention in turn."""

from typing import ClassVar

import torch
from torch import Tensor

from baselines.block import Block
from baselines.full.attention import FullAttention, plan_of_text
from baselines.gated_deltanet.config import GatedDeltaNetConfig
from baselines.gated_deltanet.layer import GatedDeltaLayer, Stretch
from baselines.gated_deltanet.operator import choose_recurrence
from baselines.gated_deltanet.state import GatedDeltaNetState, HybridLayer
from infini.config import ModelConfig
from infini.decoder import Decoder
from infini.layers.rotary import rotary_table
from infini.local import announce_backend, choose_backend
from infini.protocol import Carried
from infini.state import StreamState


class GatedDeltaNet(Decoder):
    """Decoder whose layers are by turns recurrent (arXiv:2412.06464) and sliding-window attention, as in the paper's H1.

    `memory=False` empties every matrix at the start of each segment, counted in `segment_length` from the document's start; windows
    and convolutions stay: what is lost then is what the matrices carry from segment to segment.

    Args:
        config: every choice.
        attention: backend of the windows' attention, see `infini.local`.
        recurrence: `auto`, `fla` or `torch`, see `baselines.gated_deltanet.operator`; a property of the machine too.

    Example:
        >>> model = GatedDeltaNet(GatedDeltaNetConfig(hidden_size=32, num_hidden_layers=2, segment_length=4))
        >>> _, short = model(torch.zeros(1, 9, dtype=torch.long))
        >>> _, long = model(torch.zeros(1, 900, dtype=torch.long))
        >>> short.nbytes == long.nbytes == model.state_bytes(900)
        True
    """

    config_class: ClassVar[type[ModelConfig]] = GatedDeltaNetConfig
    state_class: ClassVar[type[StreamState]] = GatedDeltaNetState

    def __init__(self, config: GatedDeltaNetConfig, attention: str = "auto", recurrence: str = "auto"):
        super().__init__(config, lambda i: Block(config, FullAttention(config) if i % 2 else GatedDeltaLayer(config)), attention)
        self.recurrence = recurrence

    def _read(self, tokens, state, reset, lengths, memory, trace) -> tuple[Tensor, GatedDeltaNetState]:
        config, device, (batch, length) = self.config, tokens.device, tokens.shape
        held = 0 if state is None or len(state.layers) == 1 else state.layers[1].keys.shape[1]
        plan = plan_of_text(tokens, config.window, config.segment_length, held, state, lengths, reset)
        positions = plan.positions[:, held:]
        begins, real = reset, None
        if not memory:
            begins = (positions % config.segment_length == 0).cpu().expand(batch, -1)
        if lengths is not None:
            there = torch.arange(length) < lengths[:, None]
            begins, real = None if begins is None else begins & there, there.to(device)
        stretch = Stretch(begins, real)
        x = self.embedding(tokens)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        backend = choose_backend(self.attention_backend, device.type, dtype, windows=True)
        announce_backend(backend, device.type, dtype)
        recurrence = choose_recurrence(self.recurrence, device, dtype, config.key_head_dim, torch.is_grad_enabled())
        rotary = rotary_table(positions, config.head_dim, config.rope_theta, torch.promote_types(torch.float32, x.dtype))
        layers = []
        for i, (block, old) in enumerate(zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True)):
            if i % 2:
                x, new = self._run(block, x, old, plan, plan, rotary, backend)
                new = HybridLayer(keys=new.keys, values=new.values)
            else:
                x, new = self._run(block, x, old, plan, stretch, recurrence)
            layers.append(new)
        if trace is not None:
            trace["layers"] = [None] * len(layers)
        return x, GatedDeltaNetState(tuple(layers), plan.tokens_seen, self.state_shape)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> GatedDeltaNetState:
        """The state of `batch_size` streams that have read nothing; calling with None in its place gives the same."""
        config, like = self.config, self.embedding.weight
        heads, keys, values = config.num_attention_heads, config.key_head_dim, config.head_dim
        place = {"device": device or like.device}
        matrix = torch.zeros(batch_size, heads, keys, values, dtype=torch.promote_types(torch.float32, like.dtype), **place)
        inputs = torch.zeros(batch_size, config.conv_size - 1, heads * (2 * keys + values), dtype=like.dtype, **place)
        nothing = torch.zeros(batch_size, 0, heads, values, dtype=like.dtype, **place)
        kinds = (HybridLayer(matrix=matrix, inputs=inputs), HybridLayer(keys=nothing, values=nothing))
        layers = tuple(kinds[i % 2] for i in range(config.num_hidden_layers))
        return GatedDeltaNetState(layers, torch.zeros(batch_size, dtype=torch.long), self.state_shape)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state after `tokens` tokens of every row; the same for any number from window - 1 on.

        Per recurrent layer heads key_head_dim head_dim numbers of 4 bytes (8 in fp64) and conv_size - 1 inputs of heads
        (2 key_head_dim + head_dim) numbers; per attention layer 2 heads head_dim numbers for each of the last window - 1 tokens;
        8 bytes of counters.
        """
        config, number = self.config, self.embedding.weight.element_size()
        recurrent, heads = -(-config.num_hidden_layers // 2), config.num_attention_heads
        matrix = config.key_head_dim * config.head_dim * max(4, number)
        inputs = (config.conv_size - 1) * (2 * config.key_head_dim + config.head_dim) * number
        window = 2 * min(tokens, config.window - 1) * config.head_dim * number
        attending = config.num_hidden_layers - recurrent
        return batch_size * (heads * (recurrent * (matrix + inputs) + attending * window) + 8)

    def carried(self, tokens: int) -> Carried:
        """What crosses a border behind a row's first `tokens` tokens, any number from 1 on: all that `state_bytes` counts but the counters.

        Example:
            >>> model = GatedDeltaNet(GatedDeltaNetConfig(hidden_size=32, num_hidden_layers=2, segment_length=4))
            >>> model.carried(800).numbers == 4 * 4 * 8 + 3 * 4 * (4 + 4 + 8) + 2 * 3 * 32  # a matrix a head, inputs, a window
            True
        """
        config, number = self.config, self.embedding.weight.element_size()
        recurrent, heads = -(-config.num_hidden_layers // 2), config.num_attention_heads
        matrices = recurrent * heads * config.key_head_dim * config.head_dim
        text = recurrent * min(tokens, config.conv_size - 1) * heads * (2 * config.key_head_dim + config.head_dim)
        text += (config.num_hidden_layers - recurrent) * 2 * min(tokens, config.window - 1) * heads * config.head_dim
        return Carried(matrices + text, max(4, number) * matrices + number * text)
