"""Compile every kernel for a GPU that need not be there: python compile_all.py CAPABILITY SHARED_BYTES DIM:DTYPE[:differ]...

With `:differ` for rows that differ. Prints what each takes; exits with 1 where one does not compile or needs more shared memory than the GPU has.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infini.kernels.choice import LARGEST_HEAD
from infini.kernels.delta import gram_backward_kernel, gram_kernel
from infini.kernels.deltanet import chunks_backward_kernel, map_kernel, prepare_backward_kernel, prepare_kernel
from infini.kernels.gamma import gamma_kernel
from infini.kernels.local import local_kernel, local_keys_kernel, local_queries_kernel
from infini.kernels.outer import outer_kernel
from infini.kernels.read import read_backward_kernel, read_kernel
from infini.kernels.read_deltanet import read_deltanet_backward_kernel, read_deltanet_kernel
from infini.kernels.scan import FEWEST, WARPS, affine_kernel, most_columns, scan_kernel, stages_of
from infini.kernels.tiles import DELTANET, LOCAL, LocalTiles, Tiles, widest_deltanet
from infini.kernels.write import write_backward_kernel

KERNELS = {
    "outer": (outer_kernel, "outer"),
    "read": (read_kernel, "read"),
    "read_backward": (read_backward_kernel, "read_backward"),
    "write_backward": (write_backward_kernel, "write_backward"),
    "scan": (scan_kernel, "outer"),
    "gram": (gram_kernel, "gram"),
    "gram_backward": (gram_backward_kernel, "gram_backward"),
    "gamma": (gamma_kernel, "outer"),
    "affine": (affine_kernel, "outer"),
    "affine_few": (affine_kernel, "outer"),
}
KERNELS |= {
    "prepare": (prepare_kernel, "prepare"),
    "map": (map_kernel, "map"),
    "chunks_backward": (chunks_backward_kernel, "chunks_backward"),
    "prepare_backward": (prepare_backward_kernel, "prepare_backward"),
    "read_deltanet": (read_deltanet_kernel, "read_deltanet"),
    "read_deltanet_backward": (read_deltanet_backward_kernel, "read_deltanet"),
}
KERNELS |= {name: (kernel, name) for name, kernel in zip(LOCAL, (local_kernel, local_queries_kernel, local_keys_kernel), strict=True)}
AFFINE = {"affine", "affine_few"}
DELTA = {"gram", "gram_backward", "gamma", *AFFINE}
OF_DELTANET = {*DELTANET, "read_deltanet_backward"}
INPUTS = {"x", "y", "k", "v", "q", "local", "mixed", "d_mixed", "dk", "dv", "dq", "d_local", "out", "d_out"}
NUMBERS = {"length", "offset", "segments", "slots", "parts", "segment_length", "groups", "heads", "filled", "mapped", "pieces", "columns", "chunks"}
NUMBERS |= {"tokens", "history", "span", "written"}
FACTORS = {"eps", "floor", "smallest", "to_exponent", "to_score"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def compiled(name, dim, dtype, capability, shared, tiles=None, ragged=False):
    kernel, tiles_of = KERNELS[name]
    if name in LOCAL:
        tiles = tiles or LocalTiles.of(name, dim, getattr(torch, dtype), shared)
        choices = {"D": dim, "BD": tiles.BD, "BQ": tiles.BQ, "BK": tiles.BK, "SHARED_BY": 2}
        return built(kernel, choices, dtype, capability, tiles.options)
    exact = dtype != "bfloat16"
    tiles = tiles or Tiles.of(tiles_of, dim, 256, exact, shared)
    choices = {"D": dim, "BD": tiles.BD, "BV": tiles.BV, "BT": tiles.BT, "PART": 256, "SHARED_BY": 2, "NORM": True, "N": tiles.BT}
    choices |= {"ROWS": tiles.rows, "AHEAD": tiles.loop_stages, "FUSED": tiles.fused, "TURNED": tiles.turned, "HEADS": 2 if tiles.fused else 1}
    choices |= {"WEIGHTS": 2, "WEIGHTED": True, "MASKED": True, "MIX_EMPTY": False, "RAGGED": ragged, "FRESH": ragged, "EXACT": exact}
    choices |= {"WHOLE": not ragged, "PARTLY": True}
    choices |= {"REVERSE": False, "TRANSPOSED": True, "BLOCK": 256, "ADD": True}
    warps = WARPS if name in AFFINE else tiles.warps
    if name in AFFINE:
        choices["BV"] = most_columns(tiles.BD, shared) if name == "affine" else FEWEST
        choices["STAGES"] = stages_of(tiles.BD, choices["BV"], shared)
    return built(kernel, choices, dtype, capability, {**tiles.options, "num_warps": warps})


def built(kernel, choices, dtype, capability, options):
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", choices[name]
            continue
        if name in FACTORS:
            signature[name] = "fp32"
        elif name in ("has_memory", "fresh"):
            signature[name] = "*u8"
        elif name == "earliest":
            signature[name] = "*i64"
        elif name == "bounds":
            signature[name] = "*i32"
        elif name in NUMBERS or name.endswith(("_batch", "_token", "_head")):
            signature[name] = "i32"
        else:
            signature[name] = f"*{DTYPES[dtype] if name in INPUTS else 'fp32'}"
        if name not in (NUMBERS - {"columns"}) | FACTORS:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability, shared, *cases):
    wrong = 0
    for case in cases:
        dim, dtype, *differ = case.split(":")
        for name in KERNELS:
            if name in DELTA and int(dim) > LARGEST_HEAD["delta"]:
                continue
            if name in OF_DELTANET and int(dim) > widest_deltanet(dtype != "bfloat16", int(shared)):
                continue
            needed = compiled(name, int(dim), dtype, int(capability), int(shared), ragged=bool(differ)).metadata.shared
            wrong += needed > int(shared)
            print(f"{name} {case}: {needed} bytes of shared memory", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
