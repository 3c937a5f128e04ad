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
    "open-lengths": {"opened": [3, 3, 2], "seen": [13, 3, 7], "empty": [False, True, False], "lengths": [11, 4, 0]},
    "open-documents": {"opened": [3, 4, 4], "seen": [13, 4, 9], "empty": [False, True, False], "reset": [(0, 9), (1, 2), (2, 0)]},
    "shorter-than-what-was-open": {"opened": [3, 0, 4], "seen": [3, 5, 9], "lengths": [2, 11, 1], "reset": [(0, 0), (2, 0)]},
    "seen-alone": {"opened": 3, "seen": [3, 13, 8], "empty": [True, False, False]},
    "reset-behind-the-end": {"lengths": [11, 3, 7], "reset": [(0, 6), (1, 3), (1, 5), (2, 10)]},
    "no-history": {"history": 0, "lengths": [11, 0, 2], "reset": [(0, 4)]},
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
        history=given.get("history", span - 1),
        lengths=torch.tensor(lengths) if "lengths" in given else None,
        reset=reset if "reset" in given else None,
        device=torch.device("cpu"),
    )
    h = plan.history
    line = torch.arange(batch * (h + tokens), dtype=torch.float64).reshape(batch, h + tokens, 1) + 1
    grid, recent = plan.line_to_grid(line), plan.recent(line)
    in_front = torch.cat([line.new_zeros(batch, span - 1 - h, 1), line], dim=1)
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
        goes_on = bool(places) and not reset[row, 0]
        if goes_on:
            assert torch.equal(grid[row, 0, : opened[row]], line[row, h - opened[row] : h])
        assert (grid[row] != 0).sum() == len(places) + (opened[row] if goes_on or not places else 0)  # and nothing else is there
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
        assert torch.equal(recent[row], in_front[row, lengths[row] :][: span - 1])
        back = plan.grid_to_line(plan.line_to_grid(line[:, h:]))
        assert torch.equal(back[row, : lengths[row]], line[row, h:][: lengths[row]])
    if plan.uniform and sliding:
        assert plan.history - plan.visible == earliest[0, 0]  # where a window's kernel is told to begin
    assert plan.segments == max(1, most)
    assert plan.padded == (min(lengths) < tokens)


@pytest.mark.parametrize("lengths", [[9, 2, 0], [9, 9, 9]])
def test_the_latest_are_of_the_last_document_alone(lengths):
    """Entry by entry: the last three of each row, those of an earlier document silenced, the state's own among them."""
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[0, 7] = reset[1, 1] = reset[1, 5] = True
    seen, count = torch.tensor([6, 2, 1]), 3
    zeros, empty = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    plan = SegmentPlan(9, 4, 4, False, zeros, seen, empty, 3, torch.tensor(lengths), reset, torch.device("cpu"))
    line = torch.arange(1.0, 1 + 3 * 12).reshape(3, 12, 1)
    for row in range(3):
        begins = max([t for t in range(lengths[row]) if reset[row, t]], default=-int(seen[row]))
        for i, found in enumerate(plan.latest(line, count)[row]):
            place = lengths[row] - count + i  # among the call's tokens; below zero in the state
            assert found == (line[row, count + place] if place >= begins else 0)


def test_rows_that_agree_need_no_index():
    zeros, empty = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    plan = SegmentPlan(12, 4, 4, False, zeros, zeros, empty, 0, None, None, torch.device("cpu"))
    line = torch.arange(24.0).reshape(2, 12, 1)
    assert plan.uniform and plan.written is None
    assert plan.line_to_grid(line).data_ptr() == line.data_ptr()
    assert plan.has_memory.tolist() == [[False, True, True]] * 2
