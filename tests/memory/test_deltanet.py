"""The products that DeltaNet's rule is computed by: any segment length, keys that repeat, and what they cost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infini import memory, reference
from infini.memory import MemoryState
from infini.testing import assert_equal_to_oracle, assert_witnessed

ROWS, SEGMENTS, HEADS, D_K, D_V = 1, 2, 2, 6, 4


def leaves(tokens, noise=None):
    """Random keys; or those of a text that repeats: three keys in turn with a little noise, strengths near 1."""
    k = torch.randn(ROWS, SEGMENTS, tokens, HEADS, D_K, dtype=torch.float64)
    w = torch.rand(ROWS, SEGMENTS, tokens, HEADS, dtype=torch.float64)
    if noise is not None:
        few = torch.randn(3, D_K, dtype=torch.float64)
        k = few[torch.arange(tokens) % 3][:, None] + noise * k
        w = 1 - 1e-3 * w
    v = torch.randn(ROWS, SEGMENTS, tokens, HEADS, D_V, dtype=torch.float64)
    return {"k": k, "w": w, "v": v, "M": torch.randn(ROWS, HEADS, D_K, D_V, dtype=torch.float64)}


def by_library(k, w, v, M):
    before, after = memory.write_segments("deltanet", MemoryState(M, None), memory.unit(k), w, v)
    return {"before": before.matrix, "after": after.matrix}


def by_reference(k, w, v, M):
    before, after = [], []
    for h in range(HEADS):
        states = [M[0, h]]
        for s in range(SEGMENTS):
            states.append(reference.update_deltanet(k[0, s, :, h], w[0, s, :, h], v[0, s, :, h], states[-1]))
        before.append(torch.stack(states[:-1]))
        after.append(states[-1])
    return {"before": torch.stack(before, dim=1)[None], "after": torch.stack(after)[None]}


def with_gradients(run, inputs, dtype):
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    found = run(**inputs)
    torch.manual_seed(1)
    total = sum((x * torch.randn(x.shape, dtype=torch.float64).to(dtype)).sum() for x in found.values())
    gradients = torch.autograd.grad(total, list(inputs.values()))
    return found | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


@pytest.mark.parametrize("tokens", [2, 63, 65, 129])
@pytest.mark.parametrize("noise", [None, 1e-3], ids=["random", "repeated"])
def test_any_segment_length_equals_the_reference(tokens, noise):
    inputs = leaves(tokens, noise)
    oracle = with_gradients(by_reference, inputs, torch.float64)
    for name, found in with_gradients(by_library, inputs, torch.float64).items():
        assert_equal_to_oracle(name, found, oracle[name])


@pytest.mark.parametrize("from_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("noise", [None, 1e-1, 1e-3, 0.0], ids=["random", "noisy", "nearly", "exact"])
def test_repeated_keys_in_low_precision_by_the_witness_rule(noise, from_dtype):
    """Filler of a hundred tokens makes I + L the worst that it can be: in the powers of L there are numbers of 1e20."""
    rounded = {name: x.to(from_dtype) for name, x in leaves(100, noise).items()}
    fast = with_gradients(by_library, rounded, torch.float32)
    plain = with_gradients(by_reference, rounded, torch.float32)
    for name, oracle in with_gradients(by_reference, rounded, torch.float64).items():
        assert_witnessed(name, fast[name], plain[name], oracle)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 21, 64])
def test_the_inverse_is_that_of_what_stands_below_the_diagonal(size):
    matrix = torch.randn(2, size, size, dtype=torch.float64) / size
    lower = torch.eye(size, dtype=torch.float64) + matrix.tril(-1)
    assert_equal_to_oracle("inverse", memory.unit_lower_inverse(matrix), torch.linalg.inv(lower))


def test_the_inverse_has_first_and_second_derivatives():
    matrix = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(memory.unit_lower_inverse, matrix)
    assert torch.autograd.gradgradcheck(memory.unit_lower_inverse, matrix)


class Cost(TorchDispatchMode):
    """Counts operations and the bytes that they make, those of the backward pass too; views are free."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes, self.names = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.operations += 1
            self.names.add(function.overloadpacket.__name__)
            self.bytes += sum(x.nbytes for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def cost(rule, rows, segments):
    inputs = [torch.rand(rows, segments, 64, 1, *size).requires_grad_() for size in ((8,), (), (8,))]
    initial = MemoryState(torch.zeros(rows, 1, 8, 8), None if rule == "deltanet" else torch.zeros(rows, 1, 8))
    with Cost() as counted:
        before, _ = memory.write_segments(rule, initial, *inputs)
        before.matrix.sum().backward()
    return counted


@pytest.mark.parametrize("rule", ["delta", "deltanet"])
def test_a_long_row_costs_in_proportion_to_its_segments(rule):
    """A gradient as large as all maps, made anew for each segment, would cost the square."""
    short, long = cost(rule, 1, 16), cost(rule, 1, 32)
    assert long.bytes < 2.2 * short.bytes and long.operations < 2.1 * short.operations


def test_nothing_is_solved_row_by_row():
    few, many = cost("deltanet", 1, 8), cost("deltanet", 8, 8)
    assert few.operations == many.operations
    assert not any("solve" in name or "inv" in name for name in few.names)


@pytest.mark.slow  # the compiler
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_it_can_be_traced_for_any_number_of_segments():
    """A fill of no tokens has other strides traced than run: the trace broke on it."""

    def total(*inputs):
        before, after = memory.write_segments("deltanet", MemoryState(inputs[3], None), *inputs[:3])
        return before.matrix.square().sum() + after.matrix.sum()

    traced = torch.compile(total, dynamic=True, backend="aot_eager")
    for segments in (2, 3):
        inputs = [torch.rand(2, segments, 8, 2, *size).requires_grad_() for size in ((4,), (), (4,))] + [torch.zeros(2, 2, 4, 4)]
        found, expected = (torch.autograd.grad(run(*inputs), inputs[:3]) for run in (traced, total))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
