"""Infini-attention: project, attend locally, read the memory, mix, write."""

import torch
from torch import Tensor, nn

from infini import memory
from infini.compiled import Part
from infini.config import InfiniConfig
from infini.layers.norm import RMSNorm, rms_normalize
from infini.layers.rotary import rotate
from infini.layers.short_conv import ShortConv
from infini.local import local_attention
from infini.memory import MemoryState
from infini.segments import SegmentPlan
from infini.state import LayerState

# Where the scales and biases of normalised memory queries and keys start: sigma(3 q) and sigma(3 k - 3). Keys start below
# zero, where ELU + 1 is an exponential, so that a key can be made small.
MEMORY_SCALE, MEMORY_KEY_BIAS = 3.0, -3.0


class InfiniAttention(nn.Module):
    """One attention layer of arXiv:2404.07143, equations (1) to (7), over any number of segments.

    Parameters (hidden size D, heads h, key/value heads g, head width d):
        q_proj `[h d, D]`, k_proj and v_proj `[g d, D]`, o_proj `[D, h d]`: no biases.
        beta `[h]`: gate logits, start at 0, so half memory and half local.
        write_gate `[g, D]` with bias `[g]` (with `write_gate`): w = sigmoid(W x + b).
        query_scale, query_bias `[h, d]`, key_scale, key_bias `[g, d]` (with `qk_norm`).
        read_norm `[d]` (with `deltanet`): RMSNorm of what is read.
        short_conv `[taps, D]` (with `short_conv`): of the input, before all projections.
    """

    def __init__(self, config: InfiniConfig, has_memory: bool):
        super().__init__()
        self.config, self.has_memory = config, has_memory
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.project, self.turn = Part(project, (), (0, 1), (0,), (0, 1)), Part(rotate, (0, 1), (0, 1), (0, 1))
        if config.short_conv:
            self.short_conv = ShortConv(config.hidden_size, config.short_conv)
        if not has_memory:
            return
        self.beta = nn.Parameter(torch.zeros(heads))
        if config.write_gate:
            self.write_gate = nn.Linear(config.hidden_size, groups)
        if config.qk_norm:
            self.query_scale = nn.Parameter(torch.full((heads, dim), MEMORY_SCALE))
            self.query_bias = nn.Parameter(torch.zeros(heads, dim))
            self.key_scale = nn.Parameter(torch.full((groups, dim), MEMORY_SCALE))
            self.key_bias = nn.Parameter(torch.full((groups, dim), MEMORY_KEY_BIAS))
        if config.update_rule == "deltanet":
            self.read_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None,
        plan: SegmentPlan,
        rotary: tuple[Tensor, Tensor],
        backend: str = "auto",
        use_memory: bool = True,
        trace: list | None = None,
        maps: list | None = None,
        memory_backend: str = "torch",
    ) -> tuple[Tensor, LayerState]:
        """Attend `x` `[batch, tokens, D]` after `state`.

        Args:
            x: normalised hidden states.
            state: what the layer carried so far; None at the start (then `plan.history` is 0).
            plan: the places of the tokens.
            rotary: cosines and sines of the plan's line.
            backend: of the local attention.
            use_memory: False silences the memory in the mix; it is written all the same.
            trace: a list that receives one dict of detached statistics, or None for a layer without memory.
            maps: a list that receives A of `memory.write_segments_with_map`, or None for a layer without memory.
            memory_backend: `torch` or `triton`, as `choose_memory_backend` found.

        Returns:
            The layer's output `[batch, tokens, D]` and its new state.
        """
        before, in_document, inputs = None, None, None
        if self.config.short_conv:
            before, in_document = self.short_conv.before(x, None if state is None else state.inputs), plan.in_document
            inputs = self.short_conv.latest(x, before, plan)
        q, k, v, strength = self.project(self, x, before, in_document)
        if state is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=1) for old, new in ((state.keys, k), (state.values, v)))
            if strength is not None:
                strength = torch.cat([state.write_strength, strength], dim=1)

        # Keys and values in the line carry no positions; they are turned here, for the local attention only.
        here = tuple(part[:, plan.history :] for part in rotary) if plan.history else rotary
        turned_q = self.turn(q, *here)
        mixed = local_attention(turned_q, self.turn(k, *rotary), v, plan, backend)

        new_memory = None
        if self.has_memory:
            # Gradients and sums of the memory need fp32, whatever the autocast.
            with torch.autocast(x.device.type, enabled=False):
                mixed, new_memory = self.remember(
                    q, k, v, strength, mixed, None if state is None else state.memory, plan, memory_backend, use_memory, trace, maps
                )
        else:
            for receiver in (trace, maps):
                if receiver is not None:
                    receiver.append(None)

        kept_strength = None if strength is None else plan.recent(strength)
        return self.o_proj(mixed.flatten(2)), LayerState(plan.recent(k), plan.recent(v), kept_strength, new_memory, inputs)

    def remember(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        strength: Tensor | None,
        local_output: Tensor,
        initial: MemoryState | None,
        plan: SegmentPlan,
        backend: str = "torch",
        use_memory: bool = True,
        trace: list | None = None,
        maps: list | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """The memory's part of the layer: write, read, mix.

        Args:
            q, local_output: of the new tokens, `[batch, tokens, h, d]`.
            k, v, strength: of the plan's line, `[batch, history + tokens, g, d]`, strength without `d` or None.
            initial: the memory before the line; None: empty.
            plan, use_memory, trace, maps: as in `forward`.
            backend: `torch` or `triton`.

        Returns:
            The mixed output like `local_output`, and the memory after the last full segment.
        """
        initial = empty_memory(self.config, k.shape[0], k) if initial is None else initial
        if backend == "triton":
            before, after = self._write_by_kernels(initial, k, v, strength, plan)
            if maps is not None:
                maps.append(self._map_by_kernels(initial, k, strength, plan))
            return self._read_by_kernels(q, before, local_output, plan, use_memory), after
        before, after = self._write(initial, k, v, strength, plan, maps)
        new_strength = None if strength is None else strength[:, plan.history :]
        return self._read_and_mix(q, before, local_output, plan, use_memory, trace, new_strength), after

    def _write(
        self, initial: MemoryState, k: Tensor, v: Tensor, strength: Tensor | None, plan: SegmentPlan, maps: list | None
    ) -> tuple[MemoryState, MemoryState]:
        """The memory before each segment and after the last; `maps` receives how the one became the other."""
        if not plan.any_written and plan.fresh is None:
            # Nothing fills up, as in most decoding steps: the memory stays as it is.
            before = MemoryState(*(None if m is None else m.unsqueeze(1) for m in initial))
            if maps is not None:
                maps.append(None)
            return before, initial
        grid = plan.line_to_grid
        arguments = (
            self.config.update_rule,
            initial,
            self._key_features(grid(k)),
            None if strength is None else grid(strength).to(initial.matrix.dtype),
            _full_precision(grid(v)),
            plan.written,
            plan.fresh,
            plan.has_memory,
        )
        if maps is None:
            return memory.write_segments(*arguments)
        before, after, carried = memory.write_segments_with_map(*arguments)
        maps.append(carried)
        return before, after

    def _read_and_mix(self, q, before, local_output, plan, use_memory, trace, strength) -> Tensor:
        """Equations (3) and (6) for the new tokens `[batch, tokens, heads, d]`."""
        dtype = local_output.dtype
        readable = plan.any_memory and use_memory
        if not readable and not self.config.gate_when_empty:
            if trace is not None:
                trace.append(self._statistics(None, None, before, strength, plan))
            return local_output
        # In a single segment the tokens need not move to their slots: all of them read the same memory.
        one = plan.segments == 1
        to_grid, to_line = (
            (lambda y: y.unsqueeze(1), lambda y: y.squeeze(1)) if one else (plan.line_to_grid, plan.grid_to_line)
        )
        local_grid = _full_precision(to_grid(local_output))
        memory_output = memory.retrieve(self._query_features(to_grid(q)), *before)
        if self.config.update_rule == "deltanet":
            memory_output = self.read_norm(memory_output)
        has_memory = plan.has_memory
        if self.config.gate_when_empty:
            if not use_memory:
                memory_output = torch.zeros_like(memory_output)
            elif has_memory is not None:
                memory_output = memory_output * has_memory[:, :, None, None, None]
            has_memory = None
        mixed = memory.mix(_full_precision(self.beta), memory_output, local_grid, has_memory)
        if trace is not None:
            trace.append(self._statistics(to_line(memory_output), local_output, before, strength, plan))
        return to_line(mixed).to(dtype)

    def _write_by_kernels(
        self, initial: MemoryState, k: Tensor, v: Tensor, strength: Tensor | None, plan: SegmentPlan
    ) -> tuple[MemoryState, MemoryState]:
        """`_write` under the rules that have kernels."""
        if not plan.any_written and plan.fresh is None:
            return MemoryState(*(None if m is None else m.unsqueeze(1) for m in initial)), initial
        if plan.uniform:
            offset = plan.history - plan.opened
            written = (k.shape[1] - offset) // plan.segment_length
        else:
            offset, written = 0, plan.segments
        rows = (plan.writes, plan.fresh)  # None and None of uniform ones
        scale, bias = (self.key_scale, self.key_bias) if self.config.qk_norm else (None, None)
        if self.config.update_rule == "deltanet":
            from infini.kernels.deltanet import write_deltanet

            M, M_after, _ = write_deltanet(
                k, v, strength, initial.matrix, offset, written, plan.segments, plan.segment_length, *rows
            )
            return MemoryState(M, None), MemoryState(M_after, None)
        places = (offset, written, plan.segments, plan.segment_length, self.config.rms_norm_eps)
        if self.config.update_rule == "linear":
            from infini.kernels.write import write_linear

            M, z, M_after, z_after = write_linear(k, v, strength, scale, bias, *initial, *places, *rows)
        else:
            from infini.kernels.delta import write_delta

            gamma = self.config.update_rule == "gamma_delta"
            M, z, M_after, z_after, _ = write_delta(
                k, v, strength, scale, bias, *initial, plan.has_memory, *places, memory.DENOMINATOR_FLOOR, *rows, gamma
            )
        return MemoryState(M, z), MemoryState(M_after, z_after)

    def _map_by_kernels(self, initial: MemoryState, k: Tensor, strength: Tensor | None, plan: SegmentPlan) -> Tensor | None:
        """A of `memory.write_segments_with_map`: what the write makes of an identity when all values are zero."""
        if self.config.update_rule == "linear" and plan.fresh is None:
            return None
        identity = torch.eye(k.shape[-1], dtype=initial.matrix.dtype, device=k.device).expand_as(initial.matrix).contiguous()
        return self._write_by_kernels(initial._replace(matrix=identity), k, torch.zeros_like(k), strength, plan)[1].matrix

    def _read_by_kernels(self, q: Tensor, before: MemoryState, local_output: Tensor, plan: SegmentPlan, use_memory: bool) -> Tensor:
        """`_read_and_mix` under the rules that have kernels."""
        has_memory = plan.has_memory
        offset = -plan.opened if plan.uniform else 0
        rows = (plan.reads, plan.padded)
        if not (plan.any_memory and use_memory):
            if not self.config.gate_when_empty:
                return local_output
            has_memory = torch.zeros(before.matrix.shape[:2], dtype=torch.bool, device=q.device)
        if self.config.update_rule == "deltanet":
            from infini.kernels.read_deltanet import read_deltanet

            return read_deltanet(
                q, local_output, before.matrix, self.read_norm.weight, self.beta, has_memory, offset, plan.segment_length,
                self.config.gate_when_empty, self.config.rms_norm_eps, *rows,
            )  # fmt: skip
        from infini.kernels.read import read_and_mix

        scale, bias = (self.query_scale, self.query_bias) if self.config.qk_norm else (None, None)
        return read_and_mix(
            q, local_output, *before, self.beta, scale, bias, has_memory, offset, plan.segment_length,
            self.config.gate_when_empty, self.config.rms_norm_eps, memory.DENOMINATOR_FLOOR, *rows,
        )  # fmt: skip

    def _query_features(self, q: Tensor) -> Tensor:
        q = _full_precision(q)
        if self.config.update_rule == "deltanet":
            return memory.unit(q)
        if self.config.qk_norm:
            q = rms_normalize(q, self.config.rms_norm_eps) * self.query_scale + self.query_bias
        return memory.feature_map(q, self.config.feature_map)

    def _key_features(self, k: Tensor) -> Tensor:
        k = _full_precision(k)
        if self.config.update_rule == "deltanet":
            return memory.unit(k)
        if self.config.qk_norm:
            k = rms_normalize(k, self.config.rms_norm_eps) * self.key_scale + self.key_bias
        return memory.feature_map(k, self.config.feature_map)

    @torch.no_grad()
    def _statistics(
        self, memory_output, local_output, before: MemoryState, strength: Tensor | None, plan: SegmentPlan
    ) -> dict[str, Tensor]:
        """What telemetry wants to know of this call: of its tokens `[batch, tokens, ...]`, padding left out."""

        def of_tokens(x: Tensor) -> Tensor:
            x = _full_precision(x)
            return x.flatten(0, 1) if plan.real is None else x[plan.real]

        weight = torch.sigmoid(self.beta.float())
        found = {"memory_weight": weight, "memory_share": weight.new_zeros(())}
        if memory_output is not None:
            from_memory = (weight[:, None] * of_tokens(memory_output)).norm()
            found["memory_share"] = from_memory / (from_memory + ((1 - weight[:, None]) * of_tokens(local_output)).norm())
        if before.normalizer is not None:
            found["normalizer_min"], found["normalizer_max"] = before.normalizer.aminmax()
        if strength is not None:
            found["write_gate_mean"] = of_tokens(strength).mean()
        return found


def project(
    layer: InfiniAttention, x: Tensor, before: Tensor | None, in_document: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values `[batch, tokens, heads, d]` of `x` `[batch, tokens, D]`, and write strengths (None without a gate).

    Args:
        layer: whose projections.
        x: normalised hidden states.
        before, in_document: for the short convolution, see `ShortConv`; None without one.
    """
    dim, strength = layer.config.head_dim, None
    if before is not None:
        x = layer.short_conv(x, before, in_document)
    q, k, v = (proj(x).unflatten(-1, (-1, dim)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.has_memory and layer.config.write_gate:
        strength = torch.sigmoid(_full_precision(layer.write_gate(x)))
    return q, k, v, strength


def empty_memory(config: InfiniConfig, batch: int, like: Tensor) -> MemoryState:
    """A memory of zeros for one layer, fp32 (fp64 if `like` is), on the device of `like`."""
    groups, dim = config.num_key_value_heads, config.head_dim
    features = memory.feature_size(dim, config.feature_map)
    dtype = torch.promote_types(torch.float32, like.dtype)
    matrix = torch.zeros(batch, groups, features, dim, dtype=dtype, device=like.device)
    return MemoryState(matrix, None if config.update_rule == "deltanet" else torch.zeros_like(matrix[..., 0]))


def _full_precision(x: Tensor) -> Tensor:
    """fp32 at least; fp64 stays."""
    return x.to(torch.promote_types(torch.float32, x.dtype))
