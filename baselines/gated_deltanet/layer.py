"""One Gated DeltaNet layer: project, convolve, write and read token by token, gate."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.gated_deltanet.config import GatedDeltaNetConfig
from baselines.gated_deltanet.operator import recur
from baselines.gated_deltanet.state import HybridLayer
from infini.compiled import Part, TokenPart
from infini.layers.norm import RMSNorm
from infini.segments import SegmentPlan

# Where the decays start, as in Mamba2: rates uniform up to 16, time steps from 0.001 to 0.1.
LARGEST_RATE, TIME_STEPS = 16.0, (1e-3, 1e-1)


class Stretch(NamedTuple):
    """What a recurrence must know of a call's tokens; both None in the usual case.

    begins: bool `[batch, tokens]` on the CPU, the matrix is emptied before this token.
    real: bool `[batch, tokens]`, on the device, False where a row has no token any more.
    """

    begins: Tensor | None
    real: Tensor | None


class ShortConvolution(nn.Module):
    """y_t = sum_i w_i * x_{t - i}, i = 0 .. size - 1, for each channel, inside a document.

    Parameters: weight `[size, channels]`, w_0 for the token itself, uniform within 1 / sqrt(size) at the start.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, x: Tensor, before: Tensor, in_document: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve the new tokens.

        Args:
            x: `[batch, tokens, channels]`.
            before: the last size - 1 inputs before them, zeros where the document has fewer.
            in_document: place of each token in its document `[batch, tokens]`; None where no document begins among them.

        Returns:
            y like `x`, and the line: `before`, and `x` behind it.
        """
        taps, weight = len(self.weight) - 1, self.weight.to(x.dtype)
        line, y = torch.cat([before.to(x.dtype), x], dim=1), weight[0] * x
        for back in range(1, taps + 1):
            earlier = line[:, taps - back : line.shape[1] - back]
            if in_document is not None:
                earlier = earlier * (in_document >= back).unsqueeze(-1)
            y = y + weight[back] * earlier
        return y, line


class GatedDeltaLayer(nn.Module):
    """The token mixer of arXiv:2412.06464, figure 1 on the right.

    Parameters (hidden size D, heads h, key width d_k, value width d):
        q_proj, k_proj `[h d_k, D]`, v_proj, gate_proj `[h d, D]`, o_proj `[D, h d]`: no biases.
        decay_proj, strength_proj `[h, D]`: a and b of alpha = exp(-exp(log_rate) softplus(a + time_bias)), beta = sigmoid(b).
        log_rate, time_bias `[h]`.
        short_conv: of queries, keys and values side by side.
        read_norm `[d]`: RMSNorm of what a head reads.
    """

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_attention_heads
        keys, values = heads * config.key_head_dim, heads * config.head_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.gate_proj = nn.Linear(hidden, values, bias=False)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.decay_proj = nn.Linear(hidden, heads, bias=False)
        self.strength_proj = nn.Linear(hidden, heads, bias=False)
        self.short_conv = ShortConvolution(2 * keys + values, config.conv_size)
        self.read_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.log_rate = nn.Parameter((LARGEST_RATE * (1 - torch.rand(heads))).log())
        shortest, longest = map(math.log, TIME_STEPS)
        step = (shortest + (longest - shortest) * torch.rand(heads)).exp()
        self.time_bias = nn.Parameter(step.expm1().log())  # softplus of it is the step
        self.project, self.finish = Part(project, (), (0, 1), (0,), (0, 1)), TokenPart(finish, 2)

    def forward(
        self, x: Tensor, state: HybridLayer | None, plan: SegmentPlan, stretch: Stretch, backend: str
    ) -> tuple[Tensor, HybridLayer]:
        """Read `x` `[batch, tokens, D]` after `state`.

        Args:
            x: normalised hidden states.
            state: the layer's matrix and last inputs; None at the start.
            plan: the places of the tokens.
            stretch: where the matrix is emptied, and which tokens there are.
            backend: `fla` or `torch`.

        Returns:
            The layer's output `[batch, tokens, D]` and its new state.
        """
        stored, (size, channels) = self.q_proj.weight.dtype, self.short_conv.weight.shape
        before = x.new_zeros(x.shape[0], size - 1, channels, dtype=stored) if state is None else state.inputs
        line, q, k, v, gate, log_decay, strength = self.project(self, x, before, plan.in_document)
        inputs = plan.latest(line, size - 1)
        # Sums over a text need fp32, whatever the autocast.
        with torch.autocast(x.device.type, enabled=False):
            if stretch.real is not None:
                log_decay, strength = (part * stretch.real.unsqueeze(-1) for part in (log_decay, strength))
            initial = None if state is None else state.matrix
            o, matrix = recur(backend, q, k, v, log_decay, strength, initial, stretch.begins)
        kept = matrix.to(torch.promote_types(torch.float32, stored))
        return self.finish(self, o, gate), HybridLayer(matrix=kept, inputs=inputs.to(stored))


def project(layer: GatedDeltaLayer, x: Tensor, before: Tensor, in_document: Tensor | None) -> tuple[Tensor, ...]:
    """What the recurrence takes, of `x` `[batch, tokens, D]`.

    Args:
        layer: whose projections.
        x: normalised hidden states.
        before, in_document: for the convolution, see `ShortConvolution`.

    Returns:
        The convolution's line `[batch, size - 1 + tokens, channels]`; queries, keys, values and gates `[batch, tokens, heads, ...]`;
        logarithms of decays, and write strengths, `[batch, tokens, heads]` in fp32 at least.
    """
    config = layer.config
    projected = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)
    convolved, line = layer.short_conv(projected, before, in_document)
    keys = config.num_attention_heads * config.key_head_dim
    q, k, v = F.silu(convolved).split([keys, keys, config.num_attention_heads * config.head_dim], dim=-1)
    q, k = (part.unflatten(-1, (-1, config.key_head_dim)) for part in (q, k))
    v, gate = (part.unflatten(-1, (-1, config.head_dim)) for part in (v, layer.gate_proj(x)))
    precise = torch.promote_types(torch.float32, x.dtype)
    a, b = layer.decay_proj(x).to(precise), layer.strength_proj(x).to(precise)
    # Decays need fp32, whatever the autocast.
    with torch.autocast(x.device.type, enabled=False):
        log_decay = -layer.log_rate.to(precise).exp() * F.softplus(a + layer.time_bias.to(precise))
        return line, q, k, v, gate, log_decay, torch.sigmoid(b)


def finish(layer: GatedDeltaLayer, o: Tensor, gate: Tensor) -> Tensor:
    """What a layer does after its recurrence: norm, gate, output projection."""
    with torch.autocast(o.device.type, enabled=False):
        read = layer.read_norm(o.to(gate.dtype)) * F.silu(gate)
    return layer.o_proj(read.flatten(-2))
