"""The plan of a call against a walk over its tokens, one after the other."""

import pytest
import torch

from infini.segments import SegmentPlan


def walk(row, n, span, sliding, opened, seen, empty, length, reset):
    """What becomes of one row: (segment, slot, position, how far back it sees) of each token, what is known of each segment."""
    places, segments = [], [{"count": opened, "fresh": False, "has": not empty}]
    position = seen
    for t in range(length):
        if reset[row, t]:
            # A document that begins with the call takes the place of the open segment.
            segments = [*segments, {}] if places else [{}]
            segments[-1] = {"count": 0, "fresh": True, "has": False}
            empty, position = True, 0
        elif segments[-1]["count"] == n:
            empty = False
            segments.append({"count": 0, "fresh": False, "has": True})
        slot = segments[-1]["count"]
        reach = min(position, span - 1) if sliding else slot
        places.append((len(segments) - 1, slot, position, reach))
        segments[-1]["count"] += 1
        position += 1
    last = segments[-1]["count"]
    return places, segments, last % n, position, empty and last != n


CASES = {
    "start": {},
    "open": {"opened": 3, "seen": 13, "empty": False},
    "lengths": {"lengths": [11, 0, 5]},
    "documents": {"reset": [(0, 4), (0, 5), (1, 0), (2, 10)]},
    "all-of-it": {
        "opened": [3, 0, 1],
        "seen": [3, 10, 6],
        "empty": [True, False, False],
        "lengths": [11, 9, 1],
        "reset": [(0, 0), (1, 7)],
    },
}


@pytest.mark.parametrize("sliding", [False, True], ids=["segment", "sliding"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_walk(case, sliding):
    given, n, tokens, batch = CASES[case], 5, 11, 3
    span = 8 if sliding else n

    def per_row(name, default):
        value = given.get(name, default)
        return value if isinstance(value, list) else [value] * batch

    opened, seen, empty = per_row("opened", 0), per_row("seen", 0), per_row("empty", True)
    lengths = per_row("lengths", tokens)
    reset = torch.zeros(batch, tokens, dtype=torch.bool)
    for row, t in given.get("reset", []):
        reset[row, t] = True
    plan = SegmentPlan(
        tokens,
        n,
        span,
        sliding,
        torch.tensor(opened),
        torch.tensor(seen),
        torch.tensor(empty),
        history=span - 1,
        lengths=torch.tensor(lengths) if "lengths" in given else None,
        reset=reset if "reset" in given else None,
        device=torch.device("cpu"),
    )
    h = span - 1
    line = torch.arange(batch * (h + tokens), dtype=torch.float64).reshape(batch, h + tokens, 1) + 1
    grid, recent = plan.line_to_grid(line), plan.recent(line)
    grid_of_new = plan.line_to_grid(line[:, h:])
    positions, earliest = (x.expand(batch, -1) for x in (plan.positions, plan.earliest))
    has = torch.ones(batch, plan.segments, dtype=torch.bool) if plan.has_memory is None else plan.has_memory
    written = torch.ones(batch, plan.segments, dtype=torch.bool) if plan.written is None else plan.written
    fresh = torch.zeros(batch, plan.segments, dtype=torch.bool) if plan.fresh is None else plan.fresh
    most = 0
    for row in range(batch):
        places, segments, open_after, seen_after, empty_after = walk(
            row, n, span, sliding, opened[row], seen[row], empty[row], lengths[row], reset
        )
        most = max(most, len(segments) if places else 0)
        for t, (segment, slot, position, reach) in enumerate(places):
            assert grid[row, segment, slot] == line[row, h + t]
            assert grid_of_new[row, segment, slot] == line[row, h + t]
            assert positions[row, h + t] == (position if sliding else slot)
            assert earliest[row, t] == h + t - reach
        if places and not reset[row, 0]:
            assert torch.equal(grid[row, 0, : opened[row]], line[row, h - opened[row] : h])
        for s, what in enumerate(segments):
            assert written[row, s] == (what["count"] == n)
            if places:
                assert fresh[row, s] == what["fresh"]
                assert has[row, s] == what["has"]
            if not plan.uniform:
                reads, writes = (list(range(*table[row, s].tolist())) for table in (plan.reads, plan.writes))
                assert reads == [t for t, place in enumerate(places) if place[0] == s]
                carried = range(h - opened[row], h) if s == 0 and not reset[row, 0] else ()
                assert writes == ([*carried, *(h + t for t in reads)] if what["count"] == n else [])
        assert not written[row, len(segments) :].any()
        assert plan.open_length[row] == open_after
        assert plan.tokens_seen[row] == seen_after
        assert plan.empty[row] == empty_after
        end = h + lengths[row]
        assert torch.equal(recent[row], line[row, end - h : end])
        back = plan.grid_to_line(plan.line_to_grid(line[:, h:]))
        assert torch.equal(back[row, : lengths[row]], line[row, h:][: lengths[row]])
    assert plan.segments == max(1, most)
    assert plan.padded == (min(lengths) < tokens)


def test_rows_that_agree_need_no_index():
    zeros, empty = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    plan = SegmentPlan(12, 4, 4, False, zeros, zeros, empty, 0, None, None, torch.device("cpu"))
    line = torch.arange(24.0).reshape(2, 12, 1)
    assert plan.uniform and plan.written is None
    assert plan.line_to_grid(line).data_ptr() == line.data_ptr()
    assert plan.has_memory.tolist() == [[False, True, True]] * 2
