"""Local attention against the loops of the reference, for every way of laying out the tokens, and its backends."""

import logging

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, local, reference
from infini.errors import InputError
from infini.local import local_attention
from infini.segments import SegmentPlan
from infini.testing import assert_equal_to_oracle, assert_witnessed

f64 = torch.float64


def plan_of(tokens, segment_length, span, sliding, seen=0, lengths=None, reset=None, batch=2):
    """A plan after `seen` tokens of a document, with the history that a state carries then."""
    return SegmentPlan(
        tokens=tokens,
        segment_length=segment_length,
        span=span,
        sliding=sliding,
        open_length=torch.full((batch,), seen % segment_length),
        tokens_seen=torch.full((batch,), seen),
        empty=torch.full((batch,), seen < segment_length),
        history=span - 1 if seen else 0,
        lengths=lengths,
        reset=reset,
        device=torch.device("cpu"),
    )


def by_reference(q, k, v, documents, segment_length, span, sliding):
    """Attention over whole documents `[(start, stop), ...]` of the line, head by head."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    rows = []
    for b in range(q.shape[0]):
        line = []
        for start, stop in documents:
            step = stop - start if sliding else segment_length
            for a in range(start, stop, step):
                now = slice(a, min(a + step, stop))
                per_head = []
                for h in range(heads):
                    one = (q[b, now, h], k[b, now, h // group], v[b, now, h // group])
                    per_head.append(reference.sliding_attention(*one, span) if sliding else reference.local_attention(*one))
                line.append(torch.stack(per_head, dim=1))
        rows.append(torch.cat(line))
    return torch.stack(rows) if rows else out


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("local_kind", ["segment", "sliding"])
@pytest.mark.parametrize(
    ("tokens", "segment_length", "window"),
    [(23, 5, 7), (1, 1, 1), (7, 64, 65), (64, 64, 64), (300, 65, 140)],
    ids=["awkward", "one", "short", "exact", "several-bands"],
)
def test_equals_the_reference(tokens, segment_length, window, local_kind, backend):
    sliding = local_kind == "sliding"
    span = window if sliding else segment_length
    q = torch.randn(2, tokens, 4, 6, dtype=f64, requires_grad=True)
    k = torch.randn(2, tokens, 2, 6, dtype=f64, requires_grad=True)
    v = torch.randn(2, tokens, 2, 6, dtype=f64, requires_grad=True)
    found = local_attention(q, k, v, plan_of(tokens, segment_length, span, sliding), backend)
    oracle = by_reference(q, k, v, [(0, tokens)], segment_length, span, sliding)
    assert_equal_to_oracle("output", found, oracle)
    weights = torch.randn_like(oracle)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, oracle))
    for name, mine, other in zip("qkv", ours, theirs, strict=True):
        assert_equal_to_oracle(f"gradient of {name}", mine, other)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("local_kind", ["segment", "sliding"])
@pytest.mark.parametrize("seen", [3, 5, 13])
def test_carries_on_after_a_history(seen, local_kind, backend):
    """New tokens after an open segment, or after a window that reaches over a border."""
    sliding, tokens, n = local_kind == "sliding", 9, 5
    span = 8 if sliding else n
    whole = torch.randn(3, 2, seen + tokens, 2, 4, dtype=f64)
    oracle = by_reference(*whole, [(0, seen + tokens)], n, span, sliding)[:, seen:]
    # The line: span - 1 tokens of history, zeros where the text is shorter.
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, span, 0))[:, -(tokens + span - 1) :] for x in whole[1:])
    found = local_attention(whole[0][:, seen:], k, v, plan_of(tokens, n, span, sliding, seen), backend)
    assert_equal_to_oracle("output", found, oracle)


@pytest.mark.parametrize("local_kind", ["segment", "sliding"])
def test_documents_do_not_see_each_other(local_kind):
    sliding, n = local_kind == "sliding", 4
    span = 6 if sliding else n
    reset = torch.zeros(2, 14, dtype=torch.bool)
    reset[:, [0, 6, 7]] = True
    q, k, v = torch.randn(3, 2, 14, 2, 4, dtype=f64)
    found = local_attention(q, k, v, plan_of(14, n, span, sliding, reset=reset))
    assert_equal_to_oracle("output", found, by_reference(q, k, v, [(0, 6), (6, 7), (7, 14)], n, span, sliding))


def test_what_is_no_token_gives_no_nan():
    lengths = torch.tensor([0, 3])
    q, k, v = torch.randn(3, 2, 5, 1, 4, requires_grad=True)
    out = local_attention(q, k, v, plan_of(5, 2, 2, False, lengths=lengths))
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("local_kind", ["segment", "sliding"])
def test_low_precision_by_the_witness_rule(local_kind, dtype):
    sliding = local_kind == "sliding"
    span = 9 if sliding else 6
    inputs = [torch.randn(2, 20, h, 8).to(dtype) for h in (4, 2, 2)]
    oracle = by_reference(*(x.double() for x in inputs), [(0, 20)], 6, span, sliding)
    fast, plain = (local_attention(*inputs, plan_of(20, 6, span, sliding), backend) for backend in ("sdpa", "eager"))
    assert fast.dtype == dtype
    assert_witnessed("output", fast, plain, oracle)


def test_flash_on_a_cpu_is_refused():
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(InputError, match="backend 'flash' cannot run: .*Use 'auto', 'sdpa' or 'eager'"):
        local_attention(x, x, x, plan_of(4, 4, 4, False, batch=1), "flash")


def test_flash_needs_cuda_and_16_bit(monkeypatch):
    """Where the package is installed, the reasons are the device and the dtype."""
    monkeypatch.setattr(local, "HAS_FLASH_ATTN", True)
    with pytest.raises(InputError, match="needs a CUDA device, not cpu"):
        local.choose_backend("flash", "cpu", torch.bfloat16)
    with pytest.raises(InputError, match=r"needs float16 or bfloat16, not torch\.float32"):
        local.choose_backend("flash", "cuda", torch.float32)
    for newer in (False, True):
        monkeypatch.setattr(local, "_on_hopper", lambda newer=newer: newer)
        assert local.choose_backend("auto", "cuda", torch.bfloat16, windows=True) == "flash"
        assert local.choose_backend("auto", "cuda", torch.bfloat16) == ("sdpa" if newer else "flash")
        assert local.choose_backend("flash", "cuda", torch.bfloat16) == "flash"  # asked for by name
    assert local.choose_backend("auto", "cuda", torch.float32) == "sdpa"


def test_unknown_backend_is_refused():
    with pytest.raises(InputError, match="backend is 'xformers'; choose one of auto, flash4, .* sdpa, eager"):
        local.choose_backend("xformers", "cpu", torch.float32)


def test_the_choice_is_logged_once(caplog):
    model = InfiniTransformer(InfiniConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, segment_length=4))
    local.announce_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="infini.local"):
        for _ in range(3):
            model(torch.zeros(1, 9, dtype=torch.long))
    assert [record.getMessage() for record in caplog.records] == ["local attention on cpu in torch.float32: sdpa"]
