"""One token more, in tensors that never move: a decoding step that a CUDA graph can hold.

Between two writes of the memory a step only reads it, so nothing in the step depends on where in the text a row stands but a
few numbers per row. They live on the device, in a plan that stands in for `SegmentPlan`; the blocks are the model's own. The
step that fills a row's segment is the model's ordinary call, once in `segment_length` tokens.
"""

import logging

import torch
from torch import Tensor

from infini.errors import InputError
from infini.kernels.choice import choose_memory_backend
from infini.layers.rotary import rotary_table
from infini.local import choose_backend
from infini.model import InfiniTransformer
from infini.segments import SegmentPlan
from infini.state import InfiniState, LayerState

CHOICES = ("eager", "graph", "auto")
WARM_UP = 3  # steps before the capture: libraries choose their kernels and workspaces in the first ones

log = logging.getLogger(__name__)


def captured_step(choice: str, model: object, state: object, earlier: "TokenStep | None" = None) -> "TokenStep | None":
    """What goes on from `state` token by token, as `choice` asks; None for the model's ordinary call.

    Args:
        choice: `eager` is the ordinary call; `graph` a captured `TokenStep` or an error; `auto` a captured one where that is
            possible, otherwise the ordinary call, and the log says why.
        model: of the protocol.
        state: of that model.
        earlier: a step that is used again if it fits.

    Raises:
        InputError: another choice, or `graph` where no step can be captured.

    Example:
        >>> captured_step("graph", torch.nn.Linear(1, 1), None)
        Traceback (most recent call last):
        ...
        infini.errors.InputError: decode is 'graph', but a Linear has no step of fixed shape; use decode=eager
    """
    if not wants_capture(choice, model):
        return None
    again = earlier is not None and earlier.fits(model, state.batch_size)
    return earlier if again else TokenStep(model, state, capture=True)


def wants_capture(choice: str, model: object) -> bool:
    """Whether `choice` means a captured step for this model here.

    Raises:
        InputError: as `captured_step`.
    """
    if choice not in CHOICES:
        raise InputError(f"decode is {choice!r}; choose one of {', '.join(CHOICES)}")
    if choice == "eager":
        return False
    why_not = _why_not(model)
    if why_not and choice == "graph":
        raise InputError(f"decode is 'graph', but {why_not}; use decode=eager")
    if why_not:
        log.info("tokens are decoded without a CUDA graph: %s", why_not)
    return why_not is None


def _why_not(model: object) -> str | None:
    """What keeps a model's step from being captured, or None."""
    if not isinstance(model, InfiniTransformer):
        return f"a {type(model).__name__} has no step of fixed shape"
    device = model.embedding.weight.device
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the model is on {device.type}"
    if model.config.segment_length == 1:
        return "segment_length is 1, so every token is written and none lies between two writes"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, whose copies of the weights no graph may hold"
    return None


class TokenStep:
    """Goes on from a state, one token a row and call, in buffers of its own.

    Equal to `model(token, state, keep="last")` call by call, and tested so. Rows may stand at different places of their
    segments. Values of the model's parameters may change while it lives, their places may not.

    Args:
        model: in evaluation mode.
        state: where to go on; it is copied and not changed.
        capture: hold the step in a CUDA graph. False runs the same step kernel by kernel, on any device.

    Example:
        >>> from infini import InfiniConfig
        >>> model = InfiniTransformer(InfiniConfig(hidden_size=32, num_hidden_layers=1, segment_length=4)).eval()
        >>> with torch.no_grad():
        ...     _, state = model(torch.tensor([[1, 2, 3, 4, 5, 6]]))
        ...     expected, _ = model(torch.tensor([[7]]), state)
        >>> torch.allclose(TokenStep(model, state, capture=False).step(torch.tensor([7])), expected[:, 0], atol=1e-5)
        True
    """

    @torch.no_grad()
    def __init__(self, model: InfiniTransformer, state: InfiniState, capture: bool):
        self.model, self.device, rows = model, state.device, state.batch_size
        fresh = model.init_state(rows, self.device)
        self._layers, self._shape = fresh.layers, fresh.shape
        self._counters = {name: getattr(fresh, name) for name in InfiniState.counters}
        self._open_length, self._tokens_seen, self._tokens = torch.zeros(3, rows, dtype=torch.long, device=self.device)
        self._has_memory, self._active = torch.ones(2, rows, dtype=torch.bool, device=self.device)
        dtype = model.embedding.weight.dtype
        self._logits = torch.zeros(rows, model.config.vocab_size, dtype=dtype, device=self.device)
        self._backend = choose_backend(model.attention_backend, self.device.type, dtype)
        kind = {name: getattr(model.config, name) for name in ("update_rule", "feature_map", "head_dim")}
        self._memory_backend = choose_memory_backend(model.memory_backend, self.device, dtype, traced=False, **kind)
        self._graph, self._places = None, _places(model)
        self.load(state)
        if capture:
            self._capture()
            self.load(state)

    def fits(self, model: InfiniTransformer, rows: int) -> bool:
        """Whether it can go on for `rows` rows of `model`, whose parameters are still where they were."""
        return model is self.model and rows == len(self._tokens) and self._places == _places(model)

    @torch.no_grad()
    def load(self, state: InfiniState, logits: Tensor | None = None) -> None:
        """Go on from another state of as many rows.

        Args:
            state: it is copied.
            logits: `[batch, vocab]` after its last tokens, which a row keeps as long as it reads nothing; None: unknown.

        Raises:
            InputError: the state is of another model or precision, or has another number of rows.
        """
        if state.shape != self._shape or state.batch_size != len(self._tokens):
            raise InputError(
                f"the state has {state.batch_size} rows and is {state.shape}; this step was made for {len(self._tokens)} rows "
                f"and {self._shape}"
            )
        self.model.check_precision(state)
        for own, layer in zip(self._layers, state.layers, strict=True):
            _copy(own, layer)
            if own.memory is not None:
                for into, values in zip(own.memory, layer.memory, strict=True):
                    if into is not None:
                        into.copy_(values)
        if logits is not None:
            self._logits.copy_(logits)
        self._counters = {name: getattr(state, name).clone() for name in InfiniState.counters}
        self._open_length.copy_(_to_send(state.open_length, self.device), non_blocking=True)
        self._tokens_seen.copy_(_to_send(state.tokens_seen, self.device), non_blocking=True)
        self._has_memory.copy_(_to_send(~state.empty, self.device), non_blocking=True)

    def state(self) -> InfiniState:
        """Where the rows stand now, as a value of its own."""
        return self._view().clone()

    @torch.no_grad()
    def step(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Read one token a row.

        Args:
            tokens: int64 `[batch]`, on the device or on the CPU; not checked against the vocabulary.
            active: bool `[batch]` on the CPU, False for a row that reads nothing; None: all read.

        Returns:
            Logits `[batch, vocab]` after the last token of each row, in a buffer that the next call overwrites.

        Raises:
            InputError: `tokens` or `active` has another shape or dtype.
        """
        active = torch.ones(len(self._tokens), dtype=torch.bool) if active is None else active
        # One number would be copied to every row, and a float cut off, without a word.
        for name, given, dtype in (("tokens", tokens, torch.int64), ("active", active, torch.bool)):
            if given.shape != self._tokens.shape or given.dtype != dtype:
                raise InputError(f"{name} are {given.dtype} {list(given.shape)}; this step takes {dtype} {list(self._tokens.shape)}")
        self._tokens.copy_(tokens, non_blocking=True)
        fills = active & (self._counters["open_length"] + 1 == self.model.config.segment_length)
        if bool(fills.any()):
            self._write(active)
            return self._logits
        self._active.copy_(_to_send(active, self.device), non_blocking=True)
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        for name in ("open_length", "tokens_seen"):
            self._counters[name] = self._counters[name] + active
        return self._logits

    def _advance(self) -> None:
        """The step that writes no memory, on the buffers alone: no shape and no branch depends on what they hold."""
        model, config = self.model, self.model.config
        plan = _OneToken(config, self._open_length, self._tokens_seen, self._has_memory, self._active)
        x = model.embedding(self._tokens.unsqueeze(1))
        rotary = rotary_table(plan.positions, config.head_dim, config.rope_theta, torch.promote_types(torch.float32, x.dtype))
        for block, own in zip(model.blocks, self._layers, strict=True):
            x, new = block(x, own, plan, rotary, self._backend, True, None, None, self._memory_backend)
            _copy(own, new)
        logits = model.head(model.norm(x))[:, 0]
        self._logits.copy_(torch.where(self._active.unsqueeze(1), logits, self._logits))
        self._open_length += self._active
        self._tokens_seen += self._active

    def _write(self, active: Tensor) -> None:
        """The step that fills a segment: the model's ordinary call, from the buffers and back into them."""
        padding = None if bool(active.all()) else ~active.unsqueeze(1).to(self.device)
        logits, state = self.model(self._tokens.unsqueeze(1), self._view(), padding=padding, keep="last")
        logits = logits[:, 0]
        self.load(state, logits if padding is None else torch.where(padding, self._logits, logits))

    def _view(self) -> InfiniState:
        """The buffers themselves as a state."""
        return InfiniState(self._layers, **self._counters, shape=self._shape)

    def _capture(self) -> None:
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._advance()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating; what they do is no part of this graph.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._advance()


class _OneToken(SegmentPlan):
    """The places of one token a row, as tensors on the device: what `SegmentPlan` makes of rows that differ, in fixed shapes.

    No segment fills up and no document begins. A row that is not active keeps what it has.
    """

    def __init__(self, config, open_length: Tensor, tokens_seen: Tensor, has_memory: Tensor, active: Tensor):
        self.tokens, self.segments, self.segment_length, self.span = 1, 1, config.segment_length, config.span
        self.sliding = config.local_attention == "sliding"
        self.history, self.device, self.batch = config.span - 1, open_length.device, len(open_length)
        self.uniform, self.any_written, self.written, self.fresh = False, False, None, None
        self.in_document = None
        self.reads, self.padded = torch.arange(2, dtype=torch.int32, device=self.device).repeat(self.batch, 1, 1), False
        # Whether there is a memory is asked on the device, row by row.
        self.any_memory, self.has_memory = True, has_memory.unsqueeze(1)
        place = tokens_seen if self.sliding else open_length
        self.positions = place.unsqueeze(1) + torch.arange(-self.history, 1, device=self.device)
        self.earliest = (self.history - place.clamp(max=self.history)).unsqueeze(1)
        self._active = active

    def recent(self, line: Tensor) -> Tensor:
        grows = self._active.reshape(-1, *[1] * (line.dim() - 1))
        return torch.where(grows, line[:, 1:], line[:, :-1])

    def latest(self, line: Tensor, count: int) -> Tensor:
        return self.recent(line)


def _places(model: InfiniTransformer) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def _copy(own: LayerState, new: LayerState) -> None:
    """Copy a layer's recent text into its buffers."""
    own.keys.copy_(new.keys)
    own.values.copy_(new.values)
    if own.write_strength is not None:
        own.write_strength.copy_(new.write_strength)
    if own.inputs is not None:
        own.inputs.copy_(new.inputs)


def _to_send(counts: Tensor, device: torch.device) -> Tensor:
    """Counters in memory from which a copy to a GPU makes nobody wait."""
    return counts.pin_memory() if device.type == "cuda" else counts
