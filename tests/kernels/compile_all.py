"""Compile every kernel for a GPU that need not be there: python compile_all.py CAPABILITY SHARED_BYTES DIM:DTYPE...

Prints what each takes; exits with 1 where one does not compile or needs more shared memory than the GPU has.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infini.kernels.choice import LARGEST_HEAD
from infini.kernels.delta import gram_backward_kernel, gram_kernel
from infini.kernels.outer import outer_kernel
from infini.kernels.read import read_backward_kernel, read_kernel
from infini.kernels.scan import COLUMNS, WARPS, affine_kernel, scan_kernel
from infini.kernels.tiles import MUCH_SHARED, Tiles
from infini.kernels.write import write_backward_kernel

KERNELS = {
    "outer": (outer_kernel, "outer"),
    "read": (read_kernel, "read"),
    "read_backward": (read_backward_kernel, "backward"),
    "write_backward": (write_backward_kernel, "backward"),
    "scan": (scan_kernel, "outer"),
    "gram": (gram_kernel, "outer"),
    "gram_backward": (gram_backward_kernel, "backward"),
    "affine": (affine_kernel, "outer"),
}
DELTA = {"gram", "gram_backward", "affine"}
INPUTS = {"x", "y", "k", "v", "q", "local", "mixed", "d_mixed", "dk", "dv", "dq", "d_local"}
NUMBERS = {"length", "offset", "segments", "slots", "parts", "segment_length", "groups", "heads", "filled", "mapped", "pieces", "columns"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def compiled(name, dim, dtype, capability, shared):
    kernel, tiles_of = KERNELS[name]
    exact = dtype != "bfloat16"
    tiles = Tiles.of(tiles_of, dim, 256, exact, shared)
    choices = {"D": dim, "BD": tiles.BD, "BV": tiles.BV, "BT": tiles.BT, "PART": 256, "SHARED_BY": 2, "NORM": True}
    choices |= {"WEIGHTS": 2, "WEIGHTED": True, "MASKED": True, "MIX_EMPTY": False, "EXACT": exact}
    choices |= {"REVERSE": False, "BLOCK": 256, "ADD": True, "STAGES": 2 if tiles.BD < 128 or shared >= MUCH_SHARED else 1}
    warps = WARPS if name == "affine" else tiles.warps
    if name == "affine":
        choices["BV"] = COLUMNS
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", choices[name]
            continue
        if name in ("eps", "floor"):
            signature[name] = "fp32"
        elif name == "has_memory":
            signature[name] = "*u8"
        elif name in NUMBERS or name.endswith(("_batch", "_token", "_head")):
            signature[name] = "i32"
        else:
            signature[name] = f"*{DTYPES[dtype] if name in INPUTS else 'fp32'}"
        if name not in NUMBERS - {"columns"} and not name.startswith(("eps", "floor")):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": tiles.stages}
    )


def main(capability, shared, *cases):
    wrong = 0
    for case in cases:
        dim, dtype = case.split(":")
        for name in KERNELS:
            if name in DELTA and int(dim) > LARGEST_HEAD["delta"]:
                continue
            needed = compiled(name, int(dim), dtype, int(capability), int(shared)).metadata.shared
            wrong += needed > int(shared)
            print(f"{name} {case}: {needed} bytes of shared memory", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
