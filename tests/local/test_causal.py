"""Causal attention by kernel: against fp64 loops where they run, and why they do not where they do not."""

import pytest
import torch

from infini import causal
from infini.causal import KERNELS, attend, why_not
from infini.errors import InputError
from infini.local import choose_backend
from infini.testing import assert_witnessed

CUDA = torch.device("cuda")


def written_out(q, k, v, window=None):
    """Head by head; the last query stands at the last key."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    place, key = torch.arange(keys - queries, keys, device=q.device)[:, None], torch.arange(keys, device=q.device)
    seen = (key <= place) & (key > place - (window or keys))
    heads = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) * q.shape[-1] ** -0.5
        heads.append(scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v[:, :, head // group])
    return torch.stack(heads, dim=2)


def with_gradients(call, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = call(*leaves)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64, device=found.device).view_as(found)
    return [found, *torch.autograd.grad((found.double() * weights).sum(), leaves)]


def assert_attends(kernel, device, dtype, groups, dim, window=None, history=0):
    inputs = [torch.randn(2, n, h, dim, device=device).to(dtype) for n, h in ((150, 4), (150 + history, groups), (150 + history, groups))]
    fast = with_gradients(lambda q, k, v: attend(kernel, q, k, v, window), inputs)
    plain = with_gradients(lambda q, k, v: written_out(q, k, v, window), inputs)
    oracle = with_gradients(lambda q, k, v: written_out(q, k, v, window), [x.double() for x in inputs])
    for name, *found in zip(("output", "dq", "dk", "dv"), fast, plain, oracle, strict=True):
        assert_witnessed(f"{kernel}: {name}", *found, dtype)


@pytest.mark.parametrize("groups", [4, 2])
def test_sdpa_anywhere(groups):
    assert_attends("sdpa", torch.device("cpu"), torch.float32, groups, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_of_this_gpu(kernel, dim, groups):
    if why := why_not(kernel, CUDA, torch.bfloat16, dim):
        pytest.skip(why)
    assert_attends(kernel, CUDA, torch.bfloat16, groups, dim)


@pytest.mark.gpu
@pytest.mark.parametrize("history", [0, 70])
@pytest.mark.parametrize("kernel", causal.WINDOWED)
def test_every_window_of_this_gpu(kernel, history):
    if why := why_not(kernel, CUDA, torch.bfloat16, 64, window=True):
        pytest.skip(why)
    assert_attends(kernel, CUDA, torch.bfloat16, 2, 64, 40, history)


@pytest.mark.parametrize(
    ("kernel", "dtype", "dim", "window", "capability", "there", "why"),
    [
        ("flash", torch.bfloat16, 64, False, (9, 0), False, "flash-attn is not installed"),
        ("flash3", torch.bfloat16, 64, False, (8, 0), True, "made for Hopper"),
        ("flash4", torch.float32, 64, False, (9, 0), True, "needs float16 or bfloat16"),
        ("cudnn", torch.bfloat16, 256, False, (9, 0), True, "no heads of 256"),
        ("cudnn", torch.bfloat16, 64, True, (9, 0), True, "knows no window"),
        ("flash4", torch.bfloat16, 64, True, (9, 0), True, None),
        ("torch_flash", torch.float16, 256, False, (8, 0), False, None),
        ("efficient", torch.float32, 64, False, (8, 0), False, None),
        ("sdpa", torch.float64, 512, False, (8, 0), False, None),
    ],
)
def test_what_cannot_run_says_why(kernel, dtype, dim, window, capability, there, why, monkeypatch):
    monkeypatch.setattr(causal, "installed", lambda kernel: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = why_not(kernel, CUDA, dtype, dim, window)
    assert found is None if why is None else why in found
    if kernel != "sdpa" and not window:
        assert why_not(kernel, torch.device("mps"), dtype, dim) == f"{kernel} needs a CUDA device, not mps"


@pytest.mark.parametrize(("content", "expected"), [("flash_attn/cute", [False, False, True]), ("flash_attn/ops", [False, False, False])])
def test_flash_attn_4_alone_is_not_version_2(content, expected, monkeypatch, tmp_path):
    """They share the name of their package."""
    (tmp_path / content).mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(causal, "installed", causal.installed.__wrapped__)
    assert [causal.installed(kernel) for kernel in ("flash", "flash3", "flash4")] == expected


def test_a_kernel_asked_for_by_a_model_is_refused_with_its_reason():
    with pytest.raises(InputError, match="'cudnn' cannot run: cudnn needs a CUDA device, not cpu. Use 'auto', 'sdpa' or 'eager'"):
        choose_backend("cudnn", "cpu", torch.bfloat16)
