"""Triton kernels of the memory path, twins of `infini.memory`: the one door to Triton.

    choice.py    which calls run on them, and why the others do not; imports no Triton
    parts.py     what the kernels share: features and their gradient, products, places of tokens
    outer.py     sums of feature x value over the tokens of each segment
    scan.py      those sums over segments, before each segment and after the last; the same of affine maps
    write.py     the write of `linear`, as a custom operator: keys and values in, memories before each segment out
    delta.py     the write of `delta`, the same
    deltanet.py  the write of `deltanet`, token after token in chunks
    read.py      read and mix, as a custom operator: queries, memories and local output in, mixed output out
    read_deltanet.py  the same of `deltanet`
    tiles.py     how each kernel is cut up
"""
