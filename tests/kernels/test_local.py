"""Attention within reach by its kernel: against eager attention in fp64, witnessed by eager attention in the same dtype."""

import logging
from dataclasses import dataclass

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, local, reference
from infini.errors import InputError
from infini.local import local_attention
from infini.segments import SegmentPlan
from infini.testing import assert_witnessed

pytest.importorskip("triton")
from infini.kernels.local import attend_in_reach  # noqa: E402
from infini.kernels.tiles import LocalTiles  # noqa: E402


@dataclass(frozen=True)
class Case:
    """`tokens` new tokens a row, of which `lengths` are real, behind `seen` ones; documents begin at the (row, token) of `begins`."""

    tokens: int = 50
    window: int | None = None
    segment: int = 20
    seen: tuple[int, ...] = (0, 0)
    lengths: tuple[int, ...] | None = None
    begins: tuple[tuple[int, int], ...] = ()
    heads: int = 2
    groups: int = 1
    dim: int = 16
    tile: tuple[int, int] = (16, 16)  # queries and keys

    @property
    def span(self):
        return self.window or self.segment

    @property
    def history(self):
        return self.span - 1 if any(self.seen) else 0

    def plan(self, device):
        seen, rows = torch.tensor(self.seen), len(self.seen)
        reset = torch.zeros(rows, self.tokens, dtype=torch.bool)
        for place in self.begins:
            reset[place] = True
        return SegmentPlan(
            tokens=self.tokens,
            segment_length=self.segment,
            span=self.span,
            sliding=self.window is not None,
            open_length=seen % self.segment,
            tokens_seen=seen,
            empty=seen < self.segment,
            history=self.history,
            lengths=None if self.lengths is None else torch.tensor(self.lengths),
            reset=reset if self.begins else None,
            device=device,
        )

    def inputs(self, dtype, device):
        """q, k, v and what the output's gradient is."""
        rows, line = len(self.seen), self.history + self.tokens
        sizes = [(rows, self.tokens, self.heads, self.dim), *[(rows, line, self.groups, self.dim)] * 2]
        sizes.append(sizes[0])
        return [torch.randn(size, dtype=torch.float64).to(device, dtype) for size in sizes]


def by_kernel(q, k, v, plan):
    return attend_in_reach(q, k, v, plan.earliest, plan.span)[0]


def by_eager(q, k, v, plan):
    return local_attention(q, k, v, plan, "eager")


def with_gradients(way, case, inputs):
    *leaves, along = [x.detach() for x in inputs]
    leaves = [x.requires_grad_() for x in leaves]
    out = way(*leaves, case.plan(leaves[0].device))
    gradients = torch.autograd.grad(out, leaves, along)
    return dict(zip(("output", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def assert_equals_eager(case, dtype, device):
    inputs = case.inputs(dtype, device)
    fast, plain = (with_gradients(way, case, inputs) for way in (by_kernel, by_eager))
    oracle = with_gradients(by_eager, case, [x.double() for x in inputs])
    for name, true in oracle.items():
        assert fast[name].dtype == dtype
        assert_witnessed(name, fast[name], plain[name], true, dtype)


@pytest.fixture
def tile(monkeypatch):
    """Other tiles than the table's."""

    def choose(queries, keys):
        def of(cls, kernel, dim, dtype, shared_memory=0):
            return cls(max(16, 1 << (dim - 1).bit_length()), queries, keys, 4, 1)

        monkeypatch.setattr(LocalTiles, "of", classmethod(of))

    return choose


CASES = {
    "segments": Case(seen=(0,)),
    "segments-of-tiles": Case(tokens=64, segment=32),
    "window": Case(window=20),
    "window-of-a-tile": Case(window=20, segment=16, tile=(16, 32), seen=(0,)),
    "window-smaller-than-a-tile": Case(window=5, segment=5, tile=(32, 16), seen=(0,)),
    "window-larger-than-the-text": Case(window=90, seen=(0,)),
    "window-of-many-tiles": Case(tokens=70, window=50, tile=(32, 16), seen=(0,)),
    "more-tiles-than-are-looked-at-together": Case(1100, 1090, heads=1, seen=(0,), tile=(16, 256)),
    "window-of-two": Case(tokens=20, window=2, segment=1),
    "history": Case(window=20, seen=(33, 33)),
    "short-history": Case(window=30, seen=(7,)),
    "open-segment": Case(seen=(33,)),
    "inside-one-segment": Case(tokens=5, seen=(29, 29)),
    "one-token": Case(tokens=1, window=20, seen=(33, 33)),
    "packed-segments": Case(begins=((0, 0), (0, 23), (0, 24), (1, 16), (1, 49))),
    "packed-windows": Case(window=20, begins=((0, 7), (0, 31), (1, 1), (1, 40))),
    "padded-segments": Case(lengths=(50, 17)),
    "padded-windows": Case(window=20, lengths=(0, 33), tile=(16, 32)),
    "everything": Case(window=20, seen=(33, 5, 0), lengths=(50, 41, 9), begins=((0, 21), (1, 0), (1, 17)), tile=(32, 16)),
    "everything-in-segments": Case(seen=(33, 5, 0), lengths=(50, 41, 9), begins=((0, 21), (1, 0), (1, 17))),
    "groups": Case(window=20, heads=6, groups=2, seen=(0,)),
    "a-memory-each": Case(window=20, heads=3, groups=3, seen=(0,), begins=((0, 9),)),
    "uneven-head": Case(window=20, dim=24, seen=(0,)),
}
CASES |= {f"width-{dim}": Case(40, 20, dim=dim, heads=1, seen=(30,), begins=((0, 15),)) for dim in (64, 96, 128, 256)}

RUNS = [(name, torch.float32) for name in CASES]
RUNS += [(name, dtype) for name in ("window", "everything", "width-128") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_equals_eager_attention(name, dtype, kernel_device, tile):
    tile(*CASES[name].tile)
    assert_equals_eager(CASES[name], dtype, kernel_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_in_the_tiles_of_the_table(dtype, kernel_device):
    """Two tiles of queries and more of keys, of which the first sees both whole and cut ones."""
    assert_equals_eager(Case(150, 140, heads=1, dim=64, seen=(200,), begins=((0, 120),)), dtype, kernel_device)


@pytest.mark.parametrize("sliding", [False, True], ids=["segment", "sliding"])
def test_equals_the_reference(sliding, kernel_device, tile):
    """Documents cut out of the text by hand, no plan in between."""
    tile(16, 16)
    case = Case(window=20 if sliding else None, begins=((0, 0), (0, 23), (0, 24)), seen=(0,))
    *x, _ = case.inputs(torch.float32, kernel_device)
    true, (q, k, v) = [], [y.double().cpu() for y in x]
    for start, stop in ((0, 23), (23, 24), (24, 50)):
        for first in range(start, stop, stop - start if sliding else 20):
            now, heads = slice(first, stop if sliding else min(first + 20, stop)), []
            for head in range(2):
                one = (q[0, now, head], k[0, now, 0], v[0, now, 0])
                heads.append(reference.sliding_attention(*one, 20) if sliding else reference.local_attention(*one))
            true.append(torch.stack(heads, dim=1))
    plan = case.plan(kernel_device)
    assert_witnessed("output", by_kernel(*x, plan), by_eager(*x, plan), torch.cat(true).unsqueeze(0))


@pytest.mark.parametrize("name", ["packed-segments", "everything"])
def test_what_is_out_of_reach_changes_nothing(name, kernel_device, tile):
    """Bit for bit: the output and dq of a query whatever the other keys are, dk and dv of a key whatever the queries that miss it are."""
    case = CASES[name]
    tile(*case.tile)
    inputs = case.inputs(torch.float32, kernel_device)
    found = with_gradients(by_kernel, case, inputs)
    key = torch.arange(case.history + case.tokens, device=kernel_device)
    earliest = case.plan(kernel_device).earliest.expand(len(case.seen), -1)
    own = case.history + torch.arange(case.tokens, device=kernel_device)
    seen = (key >= earliest[:, :, None]) & (key <= own[:, None])  # [rows, tokens, keys]
    for query in (16, case.tokens - 1):
        q, k, v, along = (x.clone() for x in inputs)
        out_of_reach = ~seen[:, query]
        assert out_of_reach.any()
        k[out_of_reach], v[out_of_reach] = 40 * torch.randn(2, int(out_of_reach.sum()), 1, 16, device=kernel_device)
        changed = with_gradients(by_kernel, case, (q, k, v, along))
        for part in ("output", "dq"):
            assert torch.equal(changed[part][:, query], found[part][:, query])
    for place in (0, case.history + 16):
        q, k, v, along = (x.clone() for x in inputs)
        misses = ~seen[:, :, place]
        q[misses], along[misses] = 40 * torch.randn(2, int(misses.sum()), case.heads, 16, device=kernel_device)
        changed = with_gradients(by_kernel, case, (q, k, v, along))
        for part in ("dk", "dv"):
            assert torch.equal(changed[part][:, place], found[part][:, place])


def test_the_same_bits_every_time(kernel_device, tile):
    case = CASES["packed-windows"]
    tile(*case.tile)
    inputs = case.inputs(torch.bfloat16, kernel_device)
    first, second = (with_gradients(by_kernel, case, inputs) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_strided_inputs_are_read_in_place(kernel_device, tile):
    """Slices of one projection cut out of a longer line, values and gradients with heads first, a gradient that is one number for all."""
    case = Case(30, window=20, heads=2, groups=2)
    tile(16, 16)
    q, k, v, along = case.inputs(torch.float32, kernel_device)
    fused = torch.cat([q, k, v], dim=-1)
    views = [x[:, 3:] for x in torch.cat([fused[:, :3], fused], dim=1).split(16, dim=-1)]
    views[2] = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in views)
    one = torch.ones((), device=kernel_device).expand(q.shape)
    for gradient in (one, along.transpose(1, 2).contiguous().transpose(1, 2)):
        expected = with_gradients(by_kernel, case, (q, k, v, gradient.contiguous()))
        found = with_gradients(by_kernel, case, (*views, gradient))
        for name, x in expected.items():
            assert torch.equal(x, found[name])


@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_the_operator_is_registered_in_full(kernel_device):
    """Schema, fake tensors, autograd, and both traced with symbols for shapes."""
    case = Case(20, window=9)
    q, k, v, _ = (x.requires_grad_() for x in case.inputs(torch.bfloat16, kernel_device))
    given = (q, k, v, case.plan(kernel_device).earliest, case.span)
    torch.library.opcheck(attend_in_reach, given)
    assert not attend_in_reach(*given)[1].requires_grad  # rather an error than a gradient that is not there


def test_keys_of_another_dtype_are_taken_as_queries_are(kernel_device):
    case = Case(20, window=9)
    plan, (q, k, v, _) = case.plan(kernel_device), case.inputs(torch.bfloat16, kernel_device)
    assert torch.equal(local_attention(q, k.double(), v.float(), plan, "triton"), by_kernel(q, k, v, plan))


@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_one_graph_for_any_shape(kernel_device):
    case = CASES["packed-windows"]
    plan, (*inputs, _) = case.plan(kernel_device), case.inputs(torch.float32, kernel_device)
    try:
        compiled = torch.compile(lambda q, k, v: local_attention(q, k, v, plan, "triton"), fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), by_kernel(*inputs, plan))
    finally:
        torch._dynamo.reset()


class Spy:
    """Counts what runs on the kernel."""

    def __init__(self, monkeypatch):
        from infini.kernels import local as kernel

        self.calls = 0
        monkeypatch.setattr(kernel, "attend_in_reach", self.counted(kernel.attend_in_reach))

    def counted(self, function):
        def call(*arguments):
            self.calls += 1
            return function(*arguments)

        return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["alone", "autocast"])
def test_a_model_of_rows_that_differ(dtype, kernel_device, monkeypatch):
    """Padding, documents, open segments and recomputed blocks; logits, state and gradients."""
    spy = Spy(monkeypatch)
    tokens, padding, reset = torch.randint(23, (2, 27)), torch.zeros(2, 27, dtype=torch.bool), torch.zeros(2, 27, dtype=torch.bool)
    padding[0, 14:17] = reset[1, 20] = reset[1, 5] = True
    config = InfiniConfig(
        vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=16, segment_length=8,
        local_attention="sliding", window=10, initializer_range=0.3,
    )  # fmt: skip

    def read(backend, device, dtype, autocast):
        torch.manual_seed(1)
        model = InfiniTransformer(config, backend).to(device, dtype)
        model.enable_recompute(True)
        state, loss, found = None, 0.0, {}
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=autocast):
            for i, piece in enumerate((slice(0, 13), slice(13, 27))):
                given = {"padding": padding[:, piece].to(device), "reset": reset[:, piece].to(device)}
                found[f"logits {i}"], state = model(tokens[:, piece].to(device), state, **given)
                loss = loss + found[f"logits {i}"].double().square().mean()
        names, parameters = zip(*model.named_parameters(), strict=True)
        return found | dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    found = read("triton", kernel_device, torch.float32, dtype != torch.float32)
    assert spy.calls == 4  # each piece once more for the gradient
    plain, oracle = read("eager", kernel_device, torch.float32, dtype != torch.float32), read("eager", "cpu", torch.float64, False)
    for name, true in oracle.items():
        assert_witnessed(name, found[name], plain[name], true, dtype)


@pytest.mark.parametrize(
    ("case", "backend", "calls"),
    [
        (Case(window=20, seen=(0,)), "sdpa", 1),
        (Case(window=20, begins=((0, 7),)), "sdpa", 1),
        (Case(lengths=(50, 9)), "sdpa", 1),
        (Case(tokens=10, seen=(25, 25)), "sdpa", 1),
        (Case(seen=(0,)), "sdpa", 0),  # whole segments need no mask
        (Case(tokens=1, window=20, seen=(33, 33)), "sdpa", 0),
        (Case(window=20, seen=(0,)), "eager", 0),
        (Case(seen=(0,)), "triton", 1),
    ],
    ids=["window", "packed", "padded", "open", "segments", "one-token", "eager", "by-name"],
)
def test_which_calls_run_on_the_kernel(case, backend, calls, kernel_device, tile, monkeypatch):
    spy = Spy(monkeypatch)
    tile(16, 16)
    has_kernel = local._has_kernel
    # As on a CUDA device in 16 bits.
    monkeypatch.setattr(local, "_has_kernel", lambda backend, *rest: backend == "sdpa" or has_kernel(backend, *rest))
    inputs = case.inputs(torch.float32, kernel_device)
    found = with_gradients(lambda *given: local_attention(*given, backend), case, inputs)
    assert spy.calls == calls
    plain, oracle = with_gradients(by_eager, case, inputs), with_gradients(by_eager, case, [x.double() for x in inputs])
    for name, true in oracle.items():
        assert_witnessed(name, found[name], plain[name], true)


def test_a_window_that_flash_attention_knows_stays_with_it(monkeypatch):
    """Rows that are alike: flash-attn; rows that differ: the kernel."""
    calls = []
    monkeypatch.setattr(local, "choose_backend", lambda backend, *_: "flash")
    monkeypatch.setattr(local, "attend", lambda kernel, q, *_: calls.append(kernel) or q)
    monkeypatch.setattr(local, "_in_reach", lambda q, *_: calls.append("reach") or q)
    for case in (Case(window=20), Case(window=20, begins=((0, 7),))):
        q, k, v, _ = case.inputs(torch.bfloat16, torch.device("cpu"))
        q = q.as_subclass(type("OnCuda", (torch.Tensor,), {"is_cuda": True}))
        local_attention(q, k, v, case.plan(torch.device("cpu")))
    assert calls == ["flash", "reach"]


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "wide", "lacks", "runs", "says"),
    [
        ("sdpa", "cuda", torch.bfloat16, False, None, True, "windows, packed and padded rows on cuda in torch.bfloat16: triton"),
        ("flash", "cuda", torch.float16, False, None, True, "torch.float16: triton"),
        ("sdpa", "cuda", torch.bfloat16, False, "no triton here", False, "masked bands (no triton here)"),
        ("sdpa", "cuda", torch.bfloat16, True, None, False, "masked bands (heads may be 256 wide)"),
        ("sdpa", "cuda", torch.float32, False, None, False, "masked bands (in torch.float32 only 'triton' by name)"),
        ("cudnn", "cuda", torch.bfloat16, False, None, False, "masked bands ('cudnn' was asked for)"),
        ("eager", "cuda", torch.bfloat16, False, None, False, None),
        ("sdpa", "cpu", torch.bfloat16, False, None, False, None),
        ("triton", "cpu", torch.float32, False, None, True, "everything on cpu in torch.float32: triton"),
    ],
)
def test_the_choice_is_logged_once(backend, device, dtype, wide, lacks, runs, says, monkeypatch, caplog):
    monkeypatch.setattr(local, "why_not_local", lambda *_: lacks)
    local._why_bands.cache_clear()
    with caplog.at_level(logging.INFO, logger="infini.local"):
        for _ in range(2):
            assert local._has_kernel(backend, torch.device(device), dtype, wide) == runs
    assert len(caplog.messages) == (says is not None)
    assert says is None or says in caplog.text
    local._why_bands.cache_clear()


def test_what_cannot_run_by_name_is_refused(kernel_device):
    case = Case(tokens=4, dim=288, seen=(0,))
    with pytest.raises(InputError, match="'triton' cannot run: heads may be 256 wide. Use 'auto', 'sdpa' or 'eager'"):
        local_attention(*case.inputs(torch.float32, kernel_device)[:3], case.plan(kernel_device), "triton")
    with pytest.raises(InputError, match="'triton' cannot run: the kernel computes in float32, bfloat16 or float16, not torch.float64"):
        local.choose_backend("triton", kernel_device.type, torch.float64)


GPU_CASES = {
    "shipped": Case(4096, 256, 256, seen=(0,) * 4, heads=4, groups=4, dim=128),
    "shipped-carried-on": Case(4100, 256, 256, seen=(1000,) * 2, heads=4, groups=4, dim=128),
    "packed": Case(4096, 256, 256, begins=tuple((row, 301 * i + row) for row in range(2) for i in range(13)), heads=4, groups=4, dim=128),
    "padded": Case(3000, None, 512, seen=(0, 700, 0, 5), lengths=(3000, 2999, 17, 0), heads=8, groups=2, dim=128),
    "wide-window": Case(5000, 2048, 512, seen=(3000,), heads=8, groups=2, dim=64),
    "uneven": Case(2001, 333, 200, seen=(77, 0), heads=6, groups=3, dim=96),
    "widest": Case(2048, 500, 256, seen=(0,), heads=4, groups=1, dim=256),
    "narrow": Case(3000, 64, 64, begins=((0, 5), (1, 2999)), heads=4, groups=2, dim=16),
    "few": Case(7, 256, 256, seen=(300, 2), lengths=(7, 3), heads=4, groups=4, dim=32),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_full_sizes_equal_eager_attention(name, dtype):
    assert_equals_eager(GPU_CASES[name], dtype, torch.device("cuda"))


@pytest.mark.gpu
def test_full_sizes_give_the_same_bits_every_time():
    case = GPU_CASES["packed"]
    inputs = case.inputs(torch.bfloat16, torch.device("cuda"))
    first, second = (with_gradients(by_kernel, case, inputs) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
