"""Triton kernels of the memory path, twins of `infini.memory`, and of local attention: the one door to Triton.

    choice.py    which calls run on them, and why the others do not; imports no Triton
    parts.py     what the kernels share: features and their gradient, products, places of tokens
    outer.py     sums of feature x value over the tokens of each segment
    scan.py      those sums over segments, before each segment and after the last; the same of affine maps
    write.py     the write of `linear`, as a custom operator: keys and values in, memories before each segment out
    delta.py     the write of `delta`, the same
    deltanet.py  the write of `deltanet`, token after token in chunks
    read.py      read and mix, as a custom operator: queries, memories and local output in, mixed output out
    read_deltanet.py  the same of `deltanet`
    local.py     attention near a token where its reach differs from token to token, as a custom operator
    tiles.py     how each kernel is cut up

Where rows are alike, the place of a segment's tokens is arithmetic. Where they differ (padding, documents that begin inside a row,
open segments of different length) it stands in a table of `infini.segments`, one entry for each row and segment; an entry is empty
where nothing is written, and the scans begin anew where a document does. Either is compiled without the other.
"""
