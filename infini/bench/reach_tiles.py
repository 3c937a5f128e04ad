"""Finds the fastest tiles of the attention within reach: `python -m infini.bench.reach_tiles OUTPUT [CASE ...]`.

Every candidate is compared with eager attention on one short row, then timed. `OUTPUT`/reach_tiles.json is written after every
kernel. Printed are entries for `infini.kernels.tiles.LOCAL_ON_HOPPER`.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from infini.bench.alone import LEAD
from infini.bench.clock import cold_milliseconds
from infini.bench.reach import Reach
from infini.bench.tiles import ROWS_OF_WARP, program
from infini.errors import InputError
from infini.kernels.tiles import LOCAL, LocalTiles
from infini.local import local_attention
from infini.testing import assert_witnessed

CASES = {
    "shipped": Reach(20, 4096, 4, 4, 128, window=256),
    "packed": Reach(20, 4096, 4, 4, 128, window=256, document=1000),
    "long": Reach(1, 131072, 8, 2, 128, window=2048),
    "narrow": Reach(4, 16384, 8, 8, 64, window=128),
    "wide": Reach(1, 65536, 4, 2, 256, window=1024),
}


def candidates(kernel: str, wide: int) -> Iterator[LocalTiles]:
    """Sizes worth a try for heads padded to `wide` numbers: sums stay in registers, and products are full instructions of Hopper."""
    for rows, others, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
        full = rows >= ROWS_OF_WARP * warps or wide > 128
        if full and rows * wide <= 2**13 * (warps // 4) * (1 if wide <= 128 else 2):
            queries, keys = (others, rows) if kernel == "local_keys" else (rows, others)
            yield LocalTiles(wide, queries, keys, warps, stages)


class Kernels:
    """The three kernels of a case, each by itself: called with tiles, it gives what it computes by name."""

    def __init__(self, reach: Reach, device: torch.device):
        from infini.kernels.local import attended_by, gradient_of_queries, gradients_of_keys

        make = torch.Generator(device=device).manual_seed(0)
        self.plan = plan = reach.plan(device)
        self.q, self.k, self.v = reach.inputs(device)
        self.along = torch.randn(self.q.shape, device=device, generator=make).to(torch.bfloat16)
        given = (self.q, self.k, self.v, plan.earliest)
        out, lse = attended_by(*given)
        _, delta = gradient_of_queries(self.along, *given, out, lse)
        self.by_name: dict[str, Callable[[LocalTiles | None], dict[str, Tensor]]] = {
            "local": lambda tiles: {"output": attended_by(*given, tiles)[0]},
            "local_queries": lambda tiles: {"dq": gradient_of_queries(self.along, *given, out, lse, tiles)[0]},
            "local_keys": lambda tiles: dict(
                zip(("dk", "dv"), gradients_of_keys(self.along, *given, lse, delta, plan.span, tiles), strict=True)
            ),
        }

    def eager(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same, written out."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out = local_attention(*leaves, self.plan, "eager")
        return dict(zip(("output", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, leaves, self.along.to(dtype))), strict=True))


def why_out(name: str, kernels: Kernels, tiles: LocalTiles, plain: dict[str, Tensor], true: dict[str, Tensor]) -> str | None:
    """Why a candidate is out, or None where its numbers are right."""
    try:
        for part, fast in kernels.by_name[name](tiles).items():
            assert_witnessed(part, fast, plain[part], true[part])
    except Exception as error:  # too little shared memory, a compiler that gives up, numbers that differ
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
    return None


def tune(
    reach: Reach, device: torch.device, tries: list[LocalTiles] | None = None, repeats: int = 5, seconds: float = 90.0
) -> Iterator[tuple[str, dict]]:
    """Each kernel's name with `timed`, `[milliseconds, queries, keys, warps, stages]` with the fastest first, `table` and `refused`.

    Args:
        tries: candidates; None: all.
        seconds: for each kernel; the candidates behind are left out.
    """
    large, small = Kernels(reach, device), Kernels(replace(reach, rows=1, tokens=min(reach.tokens, 2048)), device)
    plain, true = small.eager(torch.bfloat16), small.eager(torch.float64)
    for name in LOCAL:

        def took(tiles: LocalTiles | None, name: str = name) -> float:
            return cold_milliseconds(functools.partial(large.by_name[name], tiles), device, repeats, 0.2, LEAD)[0]

        end, timed, refused = time.monotonic() + seconds, [], {}
        for tiles in tries or candidates(name, LocalTiles.of(name, reach.head_dim, torch.bfloat16).BD):
            if time.monotonic() > end:
                print(f"{name}: not all candidates within {seconds:.0f} s", flush=True)
                break
            why = why_out(name, small, tiles, plain, true)
            if why is None:
                timed.append([took(tiles), *tiles[1:]])
            else:
                refused[why] = refused.get(why, 0) + 1
        yield name, {"timed": sorted(timed), "table": took(None), "refused": refused}


def main(arguments: list[str]) -> None:
    """Tune for the cases that are asked for, or all."""
    if not arguments:
        raise InputError("give the folder for reach_tiles.json: python -m infini.bench.reach_tiles OUTPUT [CASE ...]")
    for case in arguments[1:]:
        if case not in CASES:
            raise InputError(f"case is {case!r}; it must be one of {', '.join(CASES)}")
    path, found = Path(arguments[0]) / "reach_tiles.json", {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in arguments[1:] or CASES:
        for name, result in tune(CASES[case], torch.device("cuda")):
            found[f"{case} {name}"] = result
            path.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "cases": found}, indent=1))
            best = ", ".join(f"{tuple(tiles)} {took:.3f}" for took, *tiles in result["timed"][:4])
            print(f"{case} {name}: table {result['table']:.3f} ms; {best}; out {sum(result['refused'].values())}", flush=True)


if __name__ == "__main__":
    program(main)
