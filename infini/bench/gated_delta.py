"""The gated delta rule of flash-linear-attention, behind the same rule written out in fp64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infini.bench.agree import assert_agree
from infini.bench.attend import direction
from infini.bench.clock import LEAD
from infini.bench.trial import Trial
from infini.bench.work import HALF, Work
from infini.errors import InputError
from infini.gated_delta import gated_delta_by_fla, why_not

# Tokens that are compared: some chunks of 64, the last one open.
COMPARED = 200

UNIT_EPS = 1e-6  # of the norm of queries and keys: the library's


def trial(device: torch.device, tokens: int, heads: int, head_dim: int, gradient: bool, against: tuple[str, float] | None) -> Trial:
    """The library's operator in the shape of our memory's part: keys and values of `head_dim`, bf16, from an empty matrix.

    Its row says why where the operator is missing, or its gradients are known to be wrong.
    """

    def prepare() -> Callable[[], object]:
        why = why_not(device, torch.bfloat16, head_dim, gradient)
        if why:
            raise InputError(f"flash-linear-attention cannot run: {why}")
        assert_gated_delta(_inputs(device, min(tokens, COMPARED), heads, head_dim), gradient)
        inputs = _inputs(device, tokens, heads, head_dim)
        if not gradient:
            return lambda: gated_delta_by_fla(**inputs)
        leaves = [x.requires_grad_() for x in inputs.values()]
        along = torch.randn_like(inputs["v"])
        return lambda: torch.autograd.grad(gated_delta_by_fla(**inputs)[0], leaves, along)

    facts = {"part": "peers", "what": "gated delta rule", "backend": "fla", "direction": direction(gradient)}
    facts["shape"] = {"rows": 1, "tokens": tokens, "heads": heads, "groups": heads, "head_dim": head_dim}
    return Trial(facts, prepare, tokens, work(tokens, heads, head_dim, gradient), against, lead=LEAD)


def work(tokens: int, heads: int, head_dim: int, gradient: bool) -> Work:
    """Of one token and head: its key's value is read, its own written, and its query read; the matrix itself is not counted.

    Example:
        >>> work(1, 1, 16, gradient=False).flop  # three products of a vector with the matrix
        1536
    """
    wide, gates = HALF * tokens * heads * head_dim, 2 * 4 * tokens * heads
    forward = Work(4 * wide + gates, 3 * 2 * tokens * heads * head_dim**2)
    # q, k, v and the output's gradient are read, three gradients written, and those of decay and strength.
    return forward + Work(7 * wide + 2 * gates, 2 * forward.flop) if gradient else forward


def _inputs(device: torch.device, tokens: int, heads: int, head_dim: int) -> dict[str, Tensor]:
    """A matrix that forgets over some fifty tokens, so that it reaches over chunks."""
    wide, gate = (1, tokens, heads, head_dim), (1, tokens, heads)
    inputs = {name: torch.randn(wide, device=device, dtype=torch.bfloat16) for name in "qkv"}
    inputs["log_decay"] = -F.softplus(torch.randn(gate, device=device) - 4)
    return inputs | {"strength": torch.randn(gate, device=device).sigmoid()}


def assert_gated_delta(inputs: dict[str, Tensor], gradient: bool) -> None:
    """Assert that the operator's outputs, last matrices and, where asked, gradients are right, by the rule of `infini.testing`.

    Raises:
        AssertionError: they are not.
    """
    along = torch.randn_like(inputs["v"])

    def results(rule: Callable[..., tuple[Tensor, Tensor]], **given: Tensor) -> dict[str, Tensor]:
        leaves = {name: x.detach().clone().requires_grad_(gradient) for name, x in given.items()}
        read, last = rule(**leaves)
        found = {"output": read.detach(), "matrix": last.detach()}
        if gradient:
            gradients = torch.autograd.grad(read, list(leaves.values()), along.to(read.dtype))
            found |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        return found

    exact = {name: x.double() for name, x in inputs.items()}
    assert_agree(results(gated_delta_by_fla, **inputs), results(written_out, **inputs), results(written_out, **exact))


def written_out(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """M_t = alpha_t (I - beta_t k k^T) M_{t-1} + beta_t k v^T, then o_t = q M_t: equation (10) of arXiv:2412.06464, token by token.

    Products are of the dtype of `v`, the matrix of fp32 at least.

    Args:
        q, k, v, log_decay, strength: as in `gated_delta_by_fla`.

    Returns:
        `[batch, tokens, heads, d_v]` and the matrix after the last token.

    Example:
        >>> key, value = torch.ones(1, 2, 1, 1).double(), torch.tensor([3.0, 5.0]).double().view(1, 2, 1, 1)
        >>> always = torch.ones(1, 2, 1).double()
        >>> written_out(key, key, value, 0 * always, always)[1].round().item()  # the second value of a key replaces the first
        5.0
    """
    full, dtype, rows = torch.promote_types(torch.float32, v.dtype), v.dtype, []
    q, k = (x.to(full) * (x.to(full).square().sum(dim=-1, keepdim=True) + UNIT_EPS).rsqrt() for x in (q, k))
    M = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=full, device=v.device)
    for t in range(q.shape[1]):
        M = log_decay[:, t, :, None, None].exp() * M
        known = torch.einsum("bhk,bhkv->bhv", k[:, t].to(dtype), M.to(dtype))
        new = strength[:, t, :, None] * (v[:, t] - known).to(full)
        M = M + k[:, t, :, :, None] * new[:, :, None, :]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t].to(dtype), M.to(dtype)))
    return torch.stack(rows, dim=1), M
