"""The memory's part of one layer by its backends: write, scan, read, mix; projections and local attention left out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from infini.attention import InfiniAttention
from infini.bench.attend import direction
from infini.bench.clock import LEAD
from infini.bench.trial import Trial, Trials
from infini.bench.work import memory_part as work_of
from infini.config import InfiniConfig
from infini.kernels.choice import choose_memory_backend
from infini.segments import SegmentPlan
from infini.testing import assert_witnessed

VARIANTS = {
    "linear": {},
    "delta": {"update_rule": "delta"},
    "gamma_delta": {"update_rule": "gamma_delta"},
    "deltanet": {"update_rule": "deltanet", "write_gate": True},
    "gated": {"write_gate": True, "qk_norm": True},
}
"""Layers by the names of rows: the published ones, and `gated`, linear with write gate and normalized keys and queries."""

BACKENDS = ("torch", "compiled", "triton")


@dataclass(frozen=True)
class Shape:
    """One layer's memory at work: `rows` texts of `tokens` tokens, or documents of `document` tokens on average packed into them."""

    rows: int
    tokens: int
    segment_length: int
    heads: int
    groups: int
    head_dim: int
    variant: str = "gated"
    document: int = 0


SHAPES = (
    Shape(20, 4096, 256, 4, 4, 128),  # the shipped model
    Shape(1, 81920, 256, 4, 4, 128),
    Shape(1, 131072, 2048, 8, 8, 128, "linear"),
    Shape(1, 131072, 2048, 8, 2, 128),
    Shape(4, 16384, 128, 8, 8, 64),
    Shape(1, 65536, 1024, 8, 8, 96),
    Shape(1, 65536, 1024, 4, 2, 256),
    Shape(1, 65536, 8192, 8, 8, 128),
    # Behind the same rows without documents, which they are compared with.
    Shape(20, 4096, 256, 4, 4, 128, document=1000),
    Shape(1, 131072, 2048, 8, 8, 128, "linear", document=20000),
)


class MemoryCase:
    """A layer, the plan of rows from the start of a text, and inputs of `InfiniAttention.remember` in bf16."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        config = InfiniConfig(
            hidden_size=shape.heads * shape.head_dim,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            segment_length=shape.segment_length,
            **VARIANTS[shape.variant],
        )
        self.layer = InfiniAttention(config, has_memory=True).to(device)
        zeros = torch.zeros(shape.rows, dtype=torch.long)
        self.plan = SegmentPlan(
            tokens=shape.tokens,
            segment_length=shape.segment_length,
            span=config.span,
            sliding=False,
            open_length=zeros,
            tokens_seen=zeros,
            empty=zeros == 0,
            history=0,
            lengths=None,
            reset=_begins(shape) if shape.document else None,
            device=device,
        )

        def random(*heads_and_dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape.rows, shape.tokens, *heads_and_dim, device=device).to(dtype).requires_grad_()

        many, few = (shape.heads, shape.head_dim), (shape.groups, shape.head_dim)
        self.inputs = {"q": random(*many), "k": random(*few), "v": random(*few), "strength": None, "local_output": random(*many)}
        if config.write_gate:
            self.inputs["strength"] = random(shape.groups, dtype=torch.float32).detach().sigmoid().requires_grad_()
        self.parameters = [p for name, p in self.layer.named_parameters() if "proj" not in name and "write_gate" not in name]
        self._agreed: set[str] = set()
        self._compiled: Callable | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs that have a gradient."""
        return [x for x in self.inputs.values() if x is not None]

    def remember(self, backend: str) -> Callable[..., tuple]:
        """`InfiniAttention.remember` by a backend: `compiled` is the plain code behind `torch.compile`."""
        if backend != "compiled":
            return lambda **given: self.layer.remember(**given, initial=None, plan=self.plan, backend=backend)
        if self._compiled is None:
            torch._dynamo.reset()  # graphs of other cases
            self._compiled = torch.compile(lambda **given: self.layer.remember(**given, initial=None, plan=self.plan), dynamic=False)
        return self._compiled

    def agree(self, backend: str) -> None:
        """Assert that output, memory and gradients are right, by the rule of `infini.testing`; fp64 plain code is the oracle.

        Raises:
            AssertionError: they are not.
            InputError: the backend cannot run.
        """
        if backend == "triton":
            config = self.layer.config
            choose_memory_backend(
                "triton", self.device, torch.bfloat16,
                update_rule=config.update_rule, feature_map=config.feature_map, head_dim=config.head_dim, traced=False,
            )  # fmt: skip
        if backend in self._agreed or backend == "torch":
            return
        fast, plain, oracle = self._results(backend), self._results("torch"), self._results("torch", exact=True)
        for name, true in oracle.items():
            assert_witnessed(name, fast[name], plain[name], true, torch.bfloat16)
        self._agreed.add(backend)

    def _results(self, backend: str, exact: bool = False) -> dict[str, Tensor]:
        given = {name: x if x is None else x.detach().to(torch.float64 if exact else x.dtype) for name, x in self.inputs.items()}
        leaves = {name: x.requires_grad_() for name, x in given.items() if x is not None}
        self.layer.to(torch.float64 if exact else torch.float32)
        try:
            mixed, memory = self.remember(backend)(**given)
            loss = (mixed * mixed.detach()).sum() + memory.matrix.mean()
            if memory.normalizer is not None:
                loss = loss + memory.normalizer.sum()
            # Of a text of one segment the memory reads nothing.
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        finally:
            self.layer.float()
        found = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        found |= {name: x.detach() for name, x in memory._asdict().items() if x is not None}
        return found | {"mixed": mixed.detach()}

    def timed(self, backend: str, gradient: bool, local: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Callable[[], object]:
        """The memory's part, or with `local` the whole of attention, as a call without arguments."""
        remember, along = self.remember(backend), self.inputs["local_output"].detach()
        wanted = self.leaves + self.parameters
        if local is not None:
            wanted = [x for x in wanted if x is not self.inputs["local_output"]]

        def call() -> object:
            with torch.set_grad_enabled(gradient):
                given = self.inputs
                if local is not None:
                    given = given | {"local_output": local(given["q"], given["k"], given["v"])}
                mixed, _ = remember(**given)
                return torch.autograd.grad(mixed, wanted, along, allow_unused=True) if gradient else mixed

        return call


def _begins(shape: Shape) -> Tensor:
    """bool `[rows, tokens]`: where documents begin, the first with its row and the others anywhere."""
    drawn = torch.rand(shape.rows, shape.tokens, generator=torch.Generator().manual_seed(0))
    return (drawn < 1 / shape.document) | (torch.arange(shape.tokens) == 0)


def trials(device: torch.device, shapes: tuple[Shape, ...] = SHAPES, backends: tuple[str, ...] = BACKENDS) -> Trials:
    """The memory's part in several shapes: over the plain code, and of packed documents over whole rows by the same backend."""
    whole: dict[tuple, float] = {}
    for shape in shapes:
        case = MemoryCase(shape, device)
        for gradient in (False, True):
            plain = None
            for backend in backends:
                same = whole.get((replace(shape, document=0), backend, gradient)) if shape.document else None
                row = yield memory_trial("memory", case, backend, gradient, ("whole rows", same) if same else plain)
                if "milliseconds" in row:
                    whole[shape, backend, gradient] = row["milliseconds"]
                    if backend == "torch":
                        plain = ("torch", row["milliseconds"])
        del case


def memory_trial(part: str, case: MemoryCase, backend: str, gradient: bool, against: tuple[str, float] | None) -> Trial:
    """The memory's part of a case by a backend."""

    def prepare() -> Callable[[], object]:
        case.agree(backend)
        return case.timed(backend, gradient)

    shape = case.shape
    facts = {"part": part, "what": "memory part", "rule": shape.variant, "backend": backend, "direction": direction(gradient)}
    work = work_of(
        shape.rows * shape.tokens, shape.heads, shape.groups, shape.head_dim, case.layer.config.update_rule, gradient
    )
    return Trial(facts | {"shape": asdict(shape)}, prepare, shape.rows * shape.tokens, work, against, lead=LEAD)
