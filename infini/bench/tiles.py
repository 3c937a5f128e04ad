"""Finds the fastest tiles of every kernel: `python -m infini.bench.tiles OUTPUT [CASE[:KERNEL,...] ...]`.

First sizes and ways, then part and registers of the three fastest. Every candidate is compiled and compared with its plain twin
in processes beside each other, which fills Triton's cache; those that passed are timed here one after the other. `OUTPUT`/tiles.json
is written after every kernel, and what it holds already is not timed again. Printed are lines for `infini.kernels.tiles.TUNED`.
`WORKERS` in the environment: processes that compile.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from infini.bench.alone import LEAD, prove_all
from infini.bench.clock import cold_milliseconds, copy_bandwidth, product_rate
from infini.bench.memory import Shape
from infini.bench.pieces import Case, Piece
from infini.bench.trial import Ceilings
from infini.errors import InputError
from infini.kernels.tiles import HOPPER_SHARED, Tiles, kind_of

CASES = {
    "long": Shape(1, 131072, 2048, 8, 8, 128, "linear"),
    "short": Shape(20, 4096, 256, 4, 4, 128, "gated"),
    "delta": Shape(1, 131072, 2048, 8, 8, 128, "delta"),
    "wide": Shape(1, 65536, 1024, 4, 2, 256, "gated"),
    "narrow": Shape(4, 16384, 128, 8, 8, 64, "gated"),
}
# Of each case; `delta` adds to what `long` tunes.
KERNELS = dict.fromkeys(CASES, ("write", "read", "read_backward", "write_backward")) | {"delta": ("gram", "gram_backward")}
# A product on Hopper has 64 rows for every four warps: fewer are done by slower instructions.
ROWS_OF_WARP = 16


def candidates(kernel: str, wide: int) -> Iterator[Tiles]:
    """Sizes and ways worth a try for heads padded to `wide` numbers."""
    blocks = [block for block in (32, 64, 128) if block <= wide and (block >= wide // 4)] or [wide]
    sums = kernel in ("outer", "gram")
    turns = (False,) if sums else (False, True)
    fuses = (False, True) if kernel == "read_backward" and wide <= 128 else (False,)
    aheads = (False,) if sums else (False, True)
    stages = (2, 3, 4) if kernel in ("outer", "read", "gram") else (1, 2, 3)
    for block, tokens, warps, stage, turned, fused, ahead in itertools.product(
        blocks, (16, 32, 64, 128), (4, 8), stages, turns, fuses, aheads
    ):
        rows = block if turned or sums else tokens
        one_block = block == wide
        if rows < ROWS_OF_WARP * warps and wide >= 64:
            continue  # no full instruction, or eight warps that share the columns: the best of these lost (results/benchmarks/h100/tiles)
        if tokens * wide > 2**13 * (warps // 4) and not (kernel == "outer" and tokens * wide <= 2**14):
            continue  # a tile in fp32 is more than 64 registers of a thread
        if fused and not one_block or ahead and stage == 1 or (sums or wide <= 128) and tokens < 32:
            continue
        if kernel in ("read", "outer", "gram") and wide <= 128 and block < wide // 2:
            continue
        if kernel.endswith("backward") and wide <= 128 and not one_block:
            continue
        yield Tiles(wide, block, tokens, warps, stage, ahead=ahead, fused=fused, turned=turned)


def refinements(kernel: str, best: Tiles, segment_length: int) -> Iterator[Tiles]:
    """Other parts of a segment and limits of registers."""
    parts = (best.part,) if kernel in ("outer", "gram") else (256, 512, 1024, 2048)
    limits = (0, 128) if best.warps == 8 else (0, 168, 128)
    for part, limit in itertools.product(parts, limits):
        if (part <= segment_length or part == best.part) and (part, limit) != (best.part, best.registers):
            yield best._replace(part=part, registers=limit)


def tune(
    kernels: dict[str, tuple[Shape, str]], device: torch.device, ceilings: Ceilings, keep: Callable[[str, dict[str, Any]], None],
    workers: int | None = None, tries: list[Tiles] | None = None, repeats: int = 5, seconds: float = 60.0,
) -> None:  # fmt: skip
    """Time kernels with every candidate, all of which are compiled beside each other first; then with refinements of the best.

    Args:
        kernels: label -> shape and key of `alone.Case.pieces`.
        keep: is given each label with what was found, after both rounds: `timed`, `[milliseconds, tiles]` with the fastest first;
            `table`, what the table's tiles take; `refused`, why others are out and how often; `floor` in milliseconds.
        tries: candidates of the first round; None: all.
        seconds: as of `prove_all`, for each round.
    """
    timed: dict[str, list[tuple[float, Tiles]]] = {label: [] for label in kernels}
    refused: dict[str, dict[str, int]] = {label: {} for label in kernels}
    labels = {place: label for label, place in kernels.items()}

    def one_round(choose: Callable[[str, Shape, str], list[Tiles]]) -> None:
        passed: dict[str, list[Tiles]] = {label: [] for label in kernels}
        jobs = []
        for label, (shape, name) in kernels.items():
            seen = {tiles for _, tiles in timed[label]}
            jobs += [(shape, name, tiles) for tiles in dict.fromkeys(choose(label, shape, table_of(shape, name))) if tiles not in seen]
        for (shape, name, tiles), why in prove_all(jobs, device, workers, seconds):
            label = labels[shape, name]
            if why is None:
                passed[label].append(tiles)
            else:
                refused[label][why] = refused[label].get(why, 0) + 1
        for label, (shape, name) in kernels.items():
            piece = Case(shape, device).pieces()[name]

            def take(tiles: Tiles | None, piece: Piece = piece) -> float:
                return cold_milliseconds(lambda: piece.launch(tiles), device, repeats, 0.2, LEAD)[0]

            timed[label] += [(take(tiles), tiles) for tiles in passed[label]]
            timed[label].sort(key=lambda pair: pair[0])
            keep(
                label,
                {
                    "kernel": piece.table,
                    "wide": wide_of(shape),
                    "kind": kind_of(shape.segment_length),
                    "table": take(None),
                    "floor": ceilings.floor(piece.work),
                    "timed": [[took, list(tiles)] for took, tiles in timed[label]],
                    "refused": refused[label],
                },
            )
            del piece, take

    one_round(lambda label, shape, table: list(candidates(table, wide_of(shape))) if tries is None else tries)
    one_round(
        lambda label, shape, table: [x for _, best in timed[label][:3] for x in refinements(table, best, shape.segment_length)]
    )


def wide_of(shape: Shape) -> int:
    """Columns of a head in tiles."""
    return max(16, 1 << (shape.head_dim - 1).bit_length())


def table_of(shape: Shape, name: str) -> str:
    """The name in the table of one of the shape's kernels."""
    return "outer" if name == "write" else name


def line_of(found: dict[str, Any], record: str) -> str:
    """A line for `TUNED`."""
    took, tiles = found["timed"][0]
    key = (found["kernel"], found["wide"], False, found["kind"])
    return (
        f"{key}: {tuple(tiles[1:])},  # {took:.3f} ms, {took / found['floor']:.2f} x floor; before {found['table']:.3f} ms; {record}"
    )


def main(arguments: list[str]) -> None:
    """Tune what is asked for, or everything."""
    if not arguments:
        raise InputError("give the folder for tiles.json: python -m infini.bench.tiles OUTPUT [CASE[:KERNEL,...] ...]")
    device = torch.device("cuda")
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < HOPPER_SHARED:
        raise InputError("the table of tuned tiles is for GPUs with the shared memory of Hopper")
    path = Path(arguments[0]) / "tiles.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {"gpu": torch.cuda.get_device_name(device), "cases": {}}
    ceilings = Ceilings(copy_bandwidth(device), product_rate(device))
    workers = int(os.environ["WORKERS"]) if "WORKERS" in os.environ else None
    kernels = {}
    for asked in arguments[1:] or CASES:
        case, _, names = asked.partition(":")
        if case not in CASES:
            raise InputError(f"case is {case!r}; it must be one of {', '.join(CASES)}")
        for name in names.split(",") if names else KERNELS[case]:
            if name not in KERNELS[case]:
                raise InputError(f"kernel is {name!r}; of case {case!r} it must be one of {', '.join(KERNELS[case])}")
            kernels[f"{case} {name}"] = CASES[case], name

    def keep(label: str, result: dict[str, Any]) -> None:
        found["cases"][label] = result
        path.write_text(json.dumps(found, indent=1))

    rest = {label: place for label, place in kernels.items() if label not in found["cases"]}
    began = time.perf_counter()
    if rest:
        tune(rest, device, ceilings, keep, workers)
    print(f"{len(rest)} kernels in {time.perf_counter() - began:.0f} s", flush=True)
    for label in kernels:
        one = found["cases"][label]
        print(f"{label}: {len(one['timed'])} timed, {sum(one['refused'].values())} out: {json.dumps(one['refused'])[:400]}")
        for took, tiles in one["timed"][:5]:
            print(f"  {took:8.3f} ms  {Tiles(*tiles)}")
        if one["timed"]:
            print(line_of(one, f"{found['gpu']}, tiles.json, {label}"))


def program(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the process's arguments; what cannot be used is said in one sentence, with exit code 2."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    program(main)
