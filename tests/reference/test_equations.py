"""The reference against the equations written a second time, as whole matrices and as numbers worked out by hand."""

import math

import pytest
import torch

from infini import reference

f64 = torch.float64


def test_elu_plus_one_by_hand():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=f64)
    assert torch.allclose(reference.elu_plus_one(x), torch.tensor([math.exp(-1), 1.0, 3.0], dtype=f64), atol=1e-15)


def test_dpfp_by_hand():
    # y = [2, 0, 0, 3]; turned by one [3, 2, 0, 0], by two [0, 3, 2, 0], by three [0, 0, 3, 2].
    features = reference.dpfp(torch.tensor([2.0, -3.0], dtype=f64))
    assert features.tolist() == [6, 0, 0, 0] + [0, 0, 0, 0] + [0, 0, 0, 6]


def test_local_attention_is_masked_softmax():
    q, k, v = torch.randn(3, 7, 4, dtype=f64)
    scores = (q @ k.T / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    assert torch.allclose(reference.local_attention(q, k, v), scores.softmax(-1) @ v, atol=1e-14)
    band = scores.masked_fill(torch.ones(7, 7).tril(-3).bool(), -torch.inf)
    assert torch.allclose(reference.sliding_attention(q, k, v, 3), band.softmax(-1) @ v, atol=1e-14)


def test_retrieve_is_equation_3():
    g, M, z = torch.rand(5, 3, dtype=f64), torch.randn(3, 2, dtype=f64), torch.rand(3, dtype=f64)
    assert torch.allclose(reference.retrieve(g, M, z), (g @ M) / (g @ z)[:, None], atol=1e-14)


def test_updates_are_equations_4_and_5():
    f, v, w = torch.rand(5, 3, dtype=f64), torch.randn(5, 2, dtype=f64), torch.rand(5, dtype=f64)
    M, z = torch.randn(3, 2, dtype=f64), torch.rand(3, dtype=f64)
    linear = reference.update_linear(f, w, v, M, z)
    assert torch.allclose(linear[0], M + (w[:, None] * f).T @ v, atol=1e-14)
    assert torch.allclose(linear[1], z + w @ f, atol=1e-14)
    delta = reference.update_delta(f, w, v, M, z, empty=False)
    old = (f @ M) / (f @ z)[:, None]
    assert torch.allclose(delta[0], M + (w[:, None] * f).T @ (v - old), atol=1e-14)
    assert torch.equal(delta[1], linear[1])


def test_gamma_counts_the_new_part_of_a_key():
    f, v, one = torch.tensor([[1.0, 2.0]], dtype=f64), torch.ones(1, 1, dtype=f64), torch.ones(1, dtype=f64)
    M, z = reference.update_gamma_delta(f, one, v, torch.zeros(2, 1, dtype=f64), torch.zeros(2, dtype=f64), empty=True)
    assert z.tolist() == [1.0, 2.0]
    _, again = reference.update_gamma_delta(f, one, v, M, z, empty=False)
    assert again.tolist() == [1.0, 2.0]
    # c = 1 - (1, 2).(2, 1) / 5 = 0.2
    other = torch.tensor([[2.0, 1.0]], dtype=f64)
    _, moved = reference.update_gamma_delta(other, one, v, M, z, empty=False)
    assert torch.allclose(moved, torch.tensor([1.4, 2.2], dtype=f64), atol=1e-15)


def test_deltanet_replaces_the_value_of_a_key():
    k, v, one = torch.tensor([[3.0, 4.0]], dtype=f64), torch.tensor([[5.0]], dtype=f64), torch.ones(1, dtype=f64)
    M = reference.update_deltanet(k, one, v, torch.tensor([[1.0], [7.0]], dtype=f64))
    assert torch.allclose(torch.tensor([0.6, 0.8], dtype=f64) @ M, v[0], atol=1e-14)
    read = reference.retrieve_deltanet(torch.tensor([[6.0, 8.0]], dtype=f64), torch.cat([M, 3 * M], dim=1))
    assert torch.allclose(read, torch.tensor([[1.0, 3.0]], dtype=f64) / math.sqrt(5), atol=1e-6)


def test_gate_is_equation_6_with_its_sign():
    memory, local = torch.tensor(2.0, dtype=f64), torch.tensor(10.0, dtype=f64)
    assert reference.gate(torch.tensor(40.0, dtype=f64), memory, local).item() == pytest.approx(2.0)
    assert reference.gate(torch.tensor(math.log(3), dtype=f64), memory, local).item() == pytest.approx(4.0)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_whole_layer_as_matrices(rule):
    """Two and a half segments, four query heads on two key/value heads, widths k != v, written with whole matrices."""
    q, k, v = torch.randn(2, 10, 4, 3, dtype=f64), torch.randn(2, 10, 2, 3, dtype=f64), torch.randn(2, 10, 2, 5, dtype=f64)
    beta = torch.randn(4, dtype=f64)
    output, (M_after, z_after) = reference.infini_attention(q, k, v, beta, 4, rule)

    def sigma(x):
        return torch.nn.functional.elu(x) + 1

    for row in range(2):
        for head in range(4):
            group, w = head // 2, torch.sigmoid(beta[head])
            M, z = torch.zeros(3, 5, dtype=f64), torch.zeros(3, dtype=f64)
            for start, stop in ((0, 4), (4, 8), (8, 10)):
                Q, K, V = q[row, start:stop, head], k[row, start:stop, group], v[row, start:stop, group]
                mask = torch.ones(stop - start, stop - start).triu(1).bool()
                expected = (Q @ K.T / math.sqrt(3)).masked_fill(mask, -torch.inf).softmax(-1) @ V
                if start:
                    expected = w * (sigma(Q) @ M) / (sigma(Q) @ z)[:, None] + (1 - w) * expected
                assert torch.allclose(output[row, start:stop, head], expected, atol=1e-13)
                if stop - start == 4:
                    old = (sigma(K) @ M) / (sigma(K) @ z)[:, None] if rule == "delta" and start else 0
                    M, z = M + sigma(K).T @ (V - old), z + sigma(K).sum(0)
            assert torch.allclose(M_after[row, group], M, atol=1e-13)
            assert torch.allclose(z_after[row, group], z, atol=1e-13)


def test_unknown_rule_is_refused():
    x = torch.ones(1, 2, 1, 2)
    with pytest.raises(ValueError, match="'adam'.*'linear' and 'delta'"):
        reference.infini_attention(x, x, x, torch.zeros(1), 1, "adam")


def test_reference_imports_torch_only():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(reference))
    names = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"math", "torch"}
