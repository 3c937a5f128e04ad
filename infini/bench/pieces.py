"""The kernels of the memory, each with what it is given, its plain twin and its bytes and FLOP. Their bytes count the memories too."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infini.bench.memory import VARIANTS, Shape
from infini.bench.work import HALF, Work
from infini.kernels.tiles import Tiles, is_exact
from infini.layers.norm import rms_normalize
from infini.memory import DENOMINATOR_FLOOR, MemoryState, feature_map, unit, write_segments
from infini.testing import assert_witnessed

EPS, FULL = 1e-6, 4

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """One kernel of a case.

    Attributes:
        table: its name in `Tiles.of`; "" where there are no tiles to choose.
        launch: with these tiles, or with those of the table.
        plain: the same in plain PyTorch, of inputs in fp32 or fp64.
        work: bytes and FLOP.
    """

    name: str
    table: str
    launch: Callable[[Tiles | None], Outputs]
    plain: Callable[[torch.dtype], Outputs]
    work: Work

    def agree(self, tiles: Tiles | None = None) -> None:
        """Assert the rule of `infini.testing` for these tiles.

        Raises:
            AssertionError: numbers differ.
        """
        plain, oracle = self._witnesses
        for name, fast in self.launch(tiles).items():
            dtype = torch.bfloat16 if fast.dtype == torch.float32 else fast.dtype
            assert_witnessed(f"{self.name}: {name}", fast, plain[name], oracle[name], dtype)

    @functools.cached_property
    def _witnesses(self) -> tuple[Outputs, Outputs]:
        return self.plain(torch.float32), self.plain(torch.float64)


class Case:
    """Inputs of all kernels in one shape: whole segments, bf16, a memory that holds something."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.segments = shape, shape.tokens // shape.segment_length
        make = torch.Generator(device=device).manual_seed(0)

        def random(*size: int, to: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(*size, device=device, generator=make).to(to)

        rows, tokens, heads, groups, dim = shape.rows, shape.tokens, shape.heads, shape.groups, shape.head_dim
        full = torch.float32
        many, few = (rows, tokens, heads, dim), (rows, tokens, groups, dim)
        memories = (rows, self.segments, groups, dim)
        x = {"q": random(*many), "local": random(*many), "dy": random(*many), "k": random(*few), "v": random(*few)}
        x |= {"beta": random(heads, to=full), "M": random(*memories, dim, to=full), "z": random(*memories, to=full).abs() + 1}
        x |= {"dM": random(*memories, dim, to=full), "dz": random(*memories, to=full)}
        # G of a segment written with the mean strength: eigenvalues up to 1.
        G = random(*memories, dim, to=full)
        x["G"] = G @ G.transpose(-1, -2) / (4 * dim)
        changes = VARIANTS[shape.variant]
        x["w"] = random(rows, tokens, groups, to=full).sigmoid() if changes.get("write_gate") else None
        norm = changes.get("qk_norm", False)
        for which, number in (("q", heads), ("k", groups)):
            x[f"{which}_scale"] = random(number, dim, to=full) * 0.3 + 1.5 if norm else None
            x[f"{which}_bias"] = random(number, dim, to=full) * 0.3 if norm else None
        self.x, self.rule = x, changes.get("update_rule", "linear")

    def pieces(self) -> dict[str, Piece]:
        """The kernels of the case's rule, in the order in which they run."""
        if self.rule == "deltanet":
            return {piece.name: piece for piece in self._deltanet()}
        names = ["write", "scan", "read", "read_backward", "write_backward"]
        if self.rule in ("delta", "gamma_delta"):
            names[1:2] = ["scan" if self.rule == "delta" else "grow", "gram", "affine"]
            names += ["gram_backward"]
        return {name: getattr(self, f"_{name}")() for name in names}

    def _count(self, reads_q: int, reads_k: int, memories: int, products: int) -> Work:
        """Of so many tensors like q, like k, like all memories, and products of a token with a memory."""
        shape, dim = self.shape, self.shape.head_dim
        tokens = shape.rows * shape.tokens
        moved = HALF * tokens * dim * (reads_q * shape.heads + reads_k * shape.groups)
        moved += memories * FULL * shape.rows * self.segments * shape.groups * dim * (dim + 1)
        heads = shape.heads if reads_q else shape.groups
        return Work(moved, products * 2 * tokens * heads * dim * dim)

    def _write(self) -> Piece:
        from infini.kernels.outer import sum_outer

        x, shape = self.x, self.shape

        def launch(tiles: Tiles | None) -> Outputs:
            places = (shape.groups, 0, self.segments, self.segments, shape.segment_length, EPS)
            return dict(zip("Mz", sum_outer(x["k"], x["v"], x["w"], None, x["k_scale"], x["k_bias"], *places, tiles), strict=True))

        def plain(dtype: torch.dtype) -> Outputs:
            given = self._as(dtype)
            return dict(zip("Mz", self._sums(given), strict=True))

        return Piece("write", "outer", launch, plain, self._count(0, 2, 1, 1))

    def _scan(self) -> Piece:
        from infini.kernels.scan import scan

        x = self.x

        def launch(_: Tiles | None) -> Outputs:
            return dict(zip(("before", "last"), scan(x["dM"], x["M"][:, 0], self.segments), strict=True))

        def plain(dtype: torch.dtype) -> Outputs:
            sums = torch.cat([x["M"][:, :1], x["dM"]], dim=1).to(dtype).cumsum(dim=1)
            return {"before": sums[:, :-1], "last": sums[:, -1]}

        return Piece("scan", "", launch, plain, self._count(0, 0, 2, 0))

    def _grow(self) -> Piece:
        from infini.kernels.gamma import grow

        x, shape = self.x, self.shape

        def launch(_: Tiles | None) -> Outputs:
            places = (0, self.segments, self.segments, shape.segment_length, EPS)
            return dict(zip(("before", "last"), grow(x["k"], x["w"], x["k_scale"], x["k_bias"], x["z"][:, 0], *places)[:2], strict=True))

        def plain(dtype: torch.dtype) -> Outputs:
            given, before = self._as(dtype), []
            z = given["z"][:, 0]
            for f in self._weighed_keys(given).transpose(2, 3).unbind(dim=1):
                before.append(z)
                share = (1 - (f @ z.unsqueeze(-1)).squeeze(-1) / f.square().sum(dim=-1)).clamp(0, 1)
                z = z + (share.unsqueeze(-1) * f).sum(dim=-2)
            return {"before": torch.stack(before, dim=1), "last": z}

        return Piece("grow", "", launch, plain, self._count(0, 1, 0, 0))

    def _read(self) -> Piece:
        from infini.kernels.read import mixed_by

        x, shape = self.x, self.shape

        def launch(tiles: Tiles | None) -> Outputs:
            given = (x["q"], x["local"], x["M"], x["z"], x["beta"], x["q_scale"], x["q_bias"], None)
            return {"mixed": mixed_by(*given, 0, shape.segment_length, False, EPS, DENOMINATOR_FLOOR, tiles)}

        return Piece("read", "read", launch, lambda dtype: {"mixed": self._mixed(self._as(dtype)).to(_like(dtype))}, self._count(3, 0, 1, 1))

    def _read_backward(self) -> Piece:
        from infini.kernels.read import gradients_by

        x, shape = self.x, self.shape
        names = ["q", "local", "M", "z", "beta", "q_scale", "q_bias"]

        def launch(tiles: Tiles | None) -> Outputs:
            given = (x["dy"], *(x[name] for name in names), None)
            found = gradients_by(*given, 0, shape.segment_length, False, EPS, DENOMINATOR_FLOOR, tiles)
            return {name: gradient for name, gradient in zip(names, found, strict=True) if x[name] is not None}

        def plain(dtype: torch.dtype) -> Outputs:
            return self._gradients(dtype, names, lambda given: ((self._mixed(given), given["dy"]),))

        return Piece("read_backward", "read_backward", launch, plain, self._count(5, 0, 2, 2))

    def _write_backward(self) -> Piece:
        from infini.kernels.write import backward_of_sums, new_gradients

        x, shape = self.x, self.shape
        names = ["k", "v", "w", "k_scale", "k_bias"]

        def launch(tiles: Tiles | None) -> Outputs:
            given = (x["k"], x["v"], x["w"], x["k_scale"], x["k_bias"], x["dM"], x["dz"])
            made = new_gradients(x["k"], x["v"], x["w"], shape.tokens)
            found = backward_of_sums(*given, *made, 0, self.segments, shape.segment_length, EPS, tiles=tiles)
            return {name: gradient for name, gradient in zip(names, (*made, *found), strict=True) if x[name] is not None}

        def plain(dtype: torch.dtype) -> Outputs:
            return self._gradients(dtype, names, lambda given: tuple(zip(self._sums(given), (given["dM"], given["dz"]), strict=True)))

        return Piece("write_backward", "write_backward", launch, plain, self._count(0, 4, 1, 2))

    def _gram(self) -> Piece:
        from infini.kernels.delta import gram_sums

        x, shape = self.x, self.shape

        def launch(tiles: Tiles | None) -> Outputs:
            given = (x["k"], x["w"], x["k_scale"], x["k_bias"], x["z"], None)
            return {"G": gram_sums(*given, 0, self.segments, shape.segment_length, EPS, DENOMINATOR_FLOOR, tiles)}

        return Piece("gram", "gram", launch, lambda dtype: {"G": self._grams(self._as(dtype))}, self._count(0, 1, 1, 1))

    def _affine(self) -> Piece:
        from infini.kernels.scan import affine_scan

        x = self.x

        def launch(_: Tiles | None) -> Outputs:
            return dict(zip(("before", "last"), affine_scan(x["dM"], x["G"], x["M"][:, 0], self.segments), strict=True))

        def plain(dtype: torch.dtype) -> Outputs:
            given, before = self._as(dtype), []
            M = given["M"][:, 0]
            for addition, G in zip(given["dM"].unbind(1), given["G"].unbind(1), strict=True):
                before.append(M)
                M = M + addition - G @ M
            return {"before": torch.stack(before, dim=1), "last": M}

        dim, memories = self.shape.head_dim, self.shape.rows * self.segments * self.shape.groups
        return Piece("affine", "", launch, plain, self._count(0, 0, 3, 0) + Work(0, 2 * memories * dim**3))

    def _gram_backward(self) -> Piece:
        from infini.kernels.delta import backward_of_grams

        x, shape = self.x, self.shape
        names = ["features", "w", "z"] if x["w"] is not None else ["features", "z"]
        H = x["dM"] + x["dM"].transpose(-1, -2)

        def launch(tiles: Tiles | None) -> Outputs:
            given = (x["k"], x["w"], x["k_scale"], x["k_bias"], x["z"], None, H)
            made = {"features": torch.empty_like(x["k"]), "w": torch.empty(x["k"].shape[:3], device=H.device)}
            exact = is_exact(x["k"])
            z = backward_of_grams(*given, *made.values(), 0, self.segments, shape.segment_length, EPS, DENOMINATOR_FLOOR, exact, tiles)
            made |= {"z": z.sum(dim=2)}
            return {name: made[name] for name in names}

        def plain(dtype: torch.dtype) -> Outputs:
            given = self._as(dtype)
            given["features"] = self._features(given, "k").flatten(1, 2)
            return self._gradients(dtype, names, lambda given: ((self._grams(given), given["dM"]),), given)

        return Piece("gram_backward", "gram_backward", launch, plain, self._count(0, 2, 1, 1))

    def _deltanet(self) -> Iterator[Piece]:
        """The four kernels of the write and two of the read; what the kernels of a gradient do is compared together."""
        from infini.kernels.deltanet import Chunks
        from infini.kernels.read_deltanet import read_deltanet, read_deltanet_backward

        x, shape = self.x, self.shape
        chunks = Chunks(x["k"], x["v"], x["w"], 0, self.segments, shape.segment_length)
        norm = torch.linspace(0.5, 1.5, shape.head_dim, device=x["q"].device)
        places = (0, shape.segment_length, False, EPS)
        room = 2 * (self._count(0, 1, 0, 0).bytes)  # W or U in fp32

        def prepare(_: Tiles | None = None) -> Outputs:
            return dict(zip("WU", chunks.prepare(), strict=True))

        def solved(dtype: torch.dtype) -> Outputs:
            keys, w, values = (
                F.pad(y, (0, 0, 0, -shape.segment_length % chunks.tokens)).unflatten(3, (-1, chunks.tokens)) for y in self._tokens(self._as(dtype))
            )
            lower = w * (keys @ keys.transpose(-1, -2))  # of which the part below the diagonal counts
            solve = functools.partial(torch.linalg.solve_triangular, lower, upper=False, unitriangular=True)
            return {name: solve(w * y).flatten(0, 2) for name, y in (("W", keys), ("U", values))}

        def maps(_: Tiles | None = None) -> Outputs:
            return dict(zip("GB", chunks.maps(*ready(), self.segments), strict=True))

        def plain_maps(dtype: torch.dtype) -> Outputs:
            G, B = [], []
            keys, w, values = self._tokens(self._as(dtype))
            eye = torch.eye(shape.head_dim, dtype=dtype, device=keys.device)
            nothing = torch.zeros_like(eye).expand(*keys.shape[:3], -1, -1)
            for start, found in ((eye.expand_as(nothing), G), (nothing, B)):
                given = values if found is B else torch.zeros_like(values)
                found.append(self._segments_written(start, keys, w, given))
            return {"G": eye - G[0], "B": B[0]}

        def back(_: Tiles | None = None) -> Outputs:
            found = chunks.prepare_back(*(made := chunks.prepare()), chunks.back(*made, x["M"], x["dM"]))
            return {name: y for name, y in zip(("k", "v", "w"), found, strict=True) if x[name] is not None}

        def plain_back(dtype: torch.dtype) -> Outputs:
            def written(given: Outputs) -> tuple:
                return ((self._segments_written(given["M"], *self._tokens(given)), given["dM"]),)

            return self._gradients(dtype, ["k", "v", "w"], written)

        def mixed(given: Outputs) -> Tensor:
            q = unit(given["q"]).unflatten(1, (self.segments, -1)).unflatten(3, (shape.groups, -1))
            read = rms_normalize(torch.einsum("bsngrk,bsgkv->bsngrv", q, given["M"]), EPS) * norm.to(q.dtype)
            weight = torch.sigmoid(given["beta"])[:, None]
            return weight * read.flatten(3, 4).flatten(1, 2) + (1 - weight) * given["local"]

        def read_back(_: Tiles | None = None) -> Outputs:
            found = read_deltanet_backward(x["dy"], x["q"], x["local"], x["M"], norm, x["beta"], None, *places)
            return {name: y for name, y in zip(("q", "local", "M", "norm", "beta"), found, strict=True) if name != "norm"}

        def plain_read_back(dtype: torch.dtype) -> Outputs:
            return self._gradients(dtype, ["q", "local", "M", "beta"], lambda given: ((mixed(given), given["dy"]),))

        @functools.cache
        def ready() -> tuple[Tensor, Tensor]:
            return chunks.prepare()

        def nothing_to_compare(dtype: torch.dtype) -> Outputs:
            return {}

        yield Piece("prepare", "", prepare, solved, self._count(0, 2, 0, 1) + Work(2 * room, 0))
        yield Piece("map", "", maps, plain_maps, self._count(0, 1, 2, 4) + Work(2 * room, 0))
        yield self._affine()
        yield Piece(
            "read", "", lambda _: {"mixed": read_deltanet(x["q"], x["local"], x["M"], norm, x["beta"], None, *places)},
            lambda dtype: {"mixed": mixed(self._as(dtype)).to(_like(dtype))}, self._count(3, 0, 1, 1),
        )  # fmt: skip
        yield Piece("read_backward", "", read_back, plain_read_back, self._count(5, 0, 2, 3))
        yield Piece("write_backward", "", back, plain_back, self._count(0, 4, 2, 7))
        # Of these three the one in the middle, whose results the last one has compared; it overwrites what it is given.
        yield Piece(
            "chunks_backward", "", lambda _: chunks.back(*ready(), x["M"], x["dM"]) is None or {}, nothing_to_compare,
            self._count(0, 1, 2, 6) + Work(7 * room, 0),
        )  # fmt: skip

    def _tokens(self, given: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Unit keys, strengths and values as `[b, segments, g, tokens, d]`."""
        keys, w, values = unit(given["k"]), given["w"].unsqueeze(-1), given["v"]
        return tuple(y.unflatten(1, (self.segments, -1)).transpose(2, 3) for y in (keys, w, values))

    def _segments_written(self, M: Tensor, keys: Tensor, w: Tensor, values: Tensor) -> Tensor:
        """The memories `[b, segments, g, d, d]` after each segment by itself, each from its own M."""
        rows, segments = M.shape[:2]
        alone = [y.flatten(0, 1).unsqueeze(1).transpose(2, 3) for y in (keys, w, values)]
        _, after = write_segments("deltanet", MemoryState(M.flatten(0, 1), None), alone[0], alone[1].squeeze(-1), alone[2])
        return after.matrix.unflatten(0, (rows, segments))

    def _as(self, dtype: torch.dtype) -> Outputs:
        return {name: None if x is None else x.to(dtype) for name, x in self.x.items()}

    def _features(self, given: Outputs, which: str) -> Tensor:
        """`[b, segments, tokens, heads, d]`."""
        y = given[which]
        if given[f"{which}_scale"] is not None:
            y = rms_normalize(y, EPS) * given[f"{which}_scale"] + given[f"{which}_bias"]
        return feature_map(y, "elu").unflatten(1, (self.segments, -1))

    def _weighed_keys(self, given: Outputs) -> Tensor:
        features = self._features(given, "k")
        return features if given["w"] is None else features * given["w"].unflatten(1, (self.segments, -1)).unsqueeze(-1)

    def _sums(self, given: Outputs) -> tuple[Tensor, Tensor]:
        features = self._weighed_keys(given)
        values = given["v"].unflatten(1, (self.segments, -1))
        return torch.einsum("bsngk,bsngv->bsgkv", features, values), features.sum(dim=2)

    def _mixed(self, given: Outputs) -> Tensor:
        features = self._features(given, "q").unflatten(3, (self.shape.groups, -1))
        read = torch.einsum("bsngrk,bsgkv->bsngrv", features, given["M"])
        read = read / torch.einsum("bsngrk,bsgk->bsngr", features, given["z"]).clamp(min=DENOMINATOR_FLOOR).unsqueeze(-1)
        weight = torch.sigmoid(given["beta"])[:, None]
        return weight * read.flatten(3, 4).flatten(1, 2) + (1 - weight) * given["local"]

    def _grams(self, given: Outputs) -> Tensor:
        features = self._features(given, "k") if "features" not in given else given["features"].unflatten(1, (self.segments, -1))
        predicted = features / torch.einsum("bsngk,bsgk->bsng", features, given["z"]).clamp(min=DENOMINATOR_FLOOR).unsqueeze(-1)
        if given["w"] is not None:
            predicted = predicted * given["w"].unflatten(1, (self.segments, -1)).unsqueeze(-1)
        return torch.einsum("bsngk,bsngl->bsgkl", predicted, features)

    def _gradients(self, dtype, names, outputs, given: Outputs | None = None) -> Outputs:
        """Of what `outputs` makes of the inputs, weighed by the gradients that it gives beside it."""
        given = self._as(dtype) if given is None else given
        leaves = {name: given[name].detach().requires_grad_() for name in names if given[name] is not None}
        values, weights = zip(*outputs(given | leaves), strict=True)
        found = torch.autograd.grad(values, list(leaves.values()), weights)
        half = {"q", "local", "k", "v", "features"}
        return {name: x.to(_like(dtype) if name in half else dtype) for name, x in zip(leaves, found, strict=True)}


def _like(dtype: torch.dtype) -> torch.dtype:
    """What the plain code in fp32 hands on: bf16, as its inputs came."""
    return torch.bfloat16 if dtype == torch.float32 else dtype
