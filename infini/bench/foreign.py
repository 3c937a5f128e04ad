"""A layer of somebody else's, which the user names: loaded, looked at for two properties, and timed.

`peer=FILE.py:NAME` names a callable that builds a module around any published implementation:

    from their_package import TheirAttention
    def build(hidden_size, heads, head_dim, segment_length):
        return TheirAttention(dim=hidden_size, num_heads=heads, dim_head=head_dim, segment_len=segment_length)

The module maps `[batch, tokens, hidden_size]` to a tensor of that shape, or to a tuple that begins with one. It runs in evaluation mode,
with its own parameters in their own dtype, under bf16 autocast. Published implementations compute different things, so there is nothing
to compare its numbers with; whether it looks ahead and whether it stays finite is measured instead.
"""

import copy
import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from infini.bench.attend import direction
from infini.bench.memory import Shape
from infini.bench.projected import timed
from infini.bench.trial import Row, Trial
from infini.errors import InputError
from infini.testing import FLOORS

FORM = "FILE.py:NAME, a Python file and a callable in it"
SEGMENTS = 3  # of the texts in which a change must not be seen before it happens


def place(peer: str) -> tuple[Path, str]:
    """File and name of a peer; nothing is executed.

    Raises:
        InputError: it is not written like that, or there is no such file.

    Example:
        >>> place("theirs")
        Traceback (most recent call last):
        ...
        infini.errors.InputError: peer is 'theirs'; it must be FILE.py:NAME, a Python file and a callable in it
    """
    file, _, name = peer.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise InputError(f"peer is {peer!r}; it must be {FORM}")
    if not Path(file).is_file():
        raise InputError(f"peer is {peer!r}, but there is no file {file}: give its path from here, or the whole one")
    return Path(file).resolve(), name


@functools.cache
def load(peer: str) -> Callable[..., nn.Module]:
    """Executes a file, with its folder behind the others on the path, and gives what the name stands for.

    Raises:
        InputError: as `place`; the file fails, or has no such callable.
    """
    file, name = place(peer)
    spec = importlib.util.spec_from_file_location(f"infini_peer_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"peer is {peer!r}, but executing the file ends in {_first_line(error)}: it must run by itself") from error
    found = getattr(module, name, None)
    if not callable(found):
        there = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")) or "none"
        raise InputError(f"peer is {peer!r}, but the file has no callable {name}: name one of its own ({there})")
    return found


def build(peer: str, shape: Shape, device: torch.device) -> nn.Module:
    """The module in a shape, as it begins: moved to the device, in evaluation mode.

    Raises:
        InputError: as `load`, or the callable gives no module.
    """
    module = load(peer)(shape.heads * shape.head_dim, shape.heads, shape.head_dim, shape.segment_length)
    if not isinstance(module, nn.Module):
        raise InputError(f"peer is {peer!r}, which gives {type(module).__name__}; it must give a torch.nn.Module")
    return module.to(device).eval()


def forward_of(peer: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module from hidden states to hidden states.

    The call raises:
        InputError: what it gives has another shape.
    """

    def forward(x: Tensor) -> Tensor:
        given = module(x)
        first = given[0] if isinstance(given, tuple) and given else given
        if not isinstance(first, Tensor) or first.shape != x.shape:
            what = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise InputError(
                f"peer is {peer!r}, whose module maps {list(x.shape)} to {what}; it must give a tensor of the same shape, or a tuple "
                "that begins with one: wrap it"
            )
        return first

    return forward


def require(peer: str, shape: Shape, device: torch.device) -> None:
    """Refuses at once what can never be timed: executes the file, and the module on two segments.

    Raises:
        InputError: path, name or output do not fit.
    """
    load(peer)
    try:
        module = build(peer, shape, device)
        hidden = torch.randn(1, 2 * shape.segment_length, shape.heads * shape.head_dim, device=device).to(torch.bfloat16)
        timed(forward_of(peer, module), module, hidden, gradient=False)()
    except InputError:
        raise
    except Exception:  # of the module itself: its rows will say so
        return


def trial(peer: str, shape: Shape, device: torch.device, hidden: Tensor, gradient: bool, against: tuple[str, float] | None) -> Trial:
    """The module over the hidden states; its row says that its numbers were not compared, whether it is causal and finite.

    An exception of the module is a row that says so.
    """
    file, name = place(peer)
    facts: Row = {"part": "peers", "what": f"{name} of {file.name}", "direction": direction(gradient), "verified": False}
    facts["shape"] = {"rows": 1, "tokens": shape.tokens, "segment_length": shape.segment_length}
    facts["shape"] |= {"heads": shape.heads, "groups": shape.heads, "head_dim": shape.head_dim}

    @_told
    def prepare() -> Callable[[], object]:
        module = build(peer, shape, device)
        facts.update(causality(peer, module, shape, device))
        call = timed(forward_of(peer, module), module, hidden, gradient)
        given = call()
        facts["finite"] = all(bool(x.isfinite().all()) for x in (given if gradient else [given]) if x is not None)
        return _told(call)

    return Trial(facts, prepare, shape.tokens, against=against)


@torch.no_grad()
def causality(peer: str, module: nn.Module, shape: Shape, device: torch.device) -> Row:
    """Whether outputs change with later inputs: all tokens from a segment's border on, and from the middle of another, are drawn anew.

    Each reading is by a copy of the module, so that what it keeps between calls does not count.

    Returns:
        `noise`, what two readings of the same text differ by as a share of the largest output; unless that is large, `causal`, and `leak`,
        the largest change of an earlier output. Infinite ones are left out.
    """
    length = shape.segment_length
    text, other = torch.randn(2, 1, SEGMENTS * length, shape.heads * shape.head_dim, device=device).to(torch.bfloat16)

    def read(x: Tensor) -> Tensor:
        mine = copy.deepcopy(module)
        return timed(forward_of(peer, mine), mine, x, gradient=False)().double()

    base = read(text)
    size = float(base.nan_to_num(0, 0, 0).abs().max()) or 1.0
    found, leak = {"noise": _apart(read(text), base) / size}, 0.0
    for begin in ((SEGMENTS - 1) * length, length + length // 2):
        changed = read(torch.cat([text[:, :begin], other[:, begin:]], dim=1))
        leak = max(leak, _apart(changed[:, :begin], base[:, :begin]) / size)
    if found["noise"] <= FLOORS[torch.bfloat16]:
        found |= {"causal": leak <= 2 * found["noise"], "leak": leak}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _apart(x: Tensor, y: Tensor) -> float:
    """max |x - y|, where the same NaN or infinity on both sides is no difference."""
    same = (x == y) | (x.isnan() & y.isnan())
    return float(torch.where(same, 0, (x - y).abs()).nan_to_num(nan=math.inf).max())


def _told(call: Callable[[], object]) -> Callable[[], object]:
    """The call; an assertion of the module's own is no difference of numbers, which the benchmark would take it for."""

    def told() -> object:
        try:
            return call()
        except AssertionError as error:
            raise RuntimeError(_first_line(error)) from error

    return told


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
