"""Questions before a row's last: any name that was said by then, so that no answer can be copied from the one before."""

import re

import numpy as np
import pytest
from infini.tasks.passkey.training import PasskeyTraining

ROWS = dict(
    recall_share_start=0.0, recall_share_end=0.0, dense_question_share=1.0, segment_length=64, min_segments=24, max_segments=40
)
GAPS = dict(gap_share=1.0, gap_after=0.0, gap_growth=0.0, max_gap_segments=1)
KINDS = {
    "competing_4": (
        r"The pass key of (\w+) is (\d{5})\. Remember it\.",
        r"What is the pass key of (\w+)\? The pass key of \1 is (\d{5})\.",
    ),
    "phrase": (r"\n(The [a-z ]+) (\d{5})\. ", r"\n(?:What was it\?|And now again:|Tell me the number\.) (The [a-z ]+) (\d{5})\."),
}


@pytest.mark.parametrize("gap", [{}, GAPS], ids=["", "gap"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_was_said_and_changes(kind, gap):
    statement, question = KINDS[kind]
    source = PasskeyTraining(steps=20, needle_shares={kind: 1.0}, **ROWS, **gap)
    changes, kept, late = 0, 0, 0
    for step in range(10, 20):
        batch = source[step]
        for tokens, answer in zip(batch.tokens, batch.answer.numpy()):
            text = bytes(tokens.tolist()).decode()
            said = {found[1]: (found.start(), found[2]) for found in re.finditer(statement, text)}
            asked = list(re.finditer(question, text))
            if not said or not asked:  # too short a row for its kind
                continue
            for found in asked:
                place, key = said[found[1]]
                assert place < found.start() and key == found[2]
                digits = found.end() - 6
                assert answer[digits : digits + 6].all() and not answer[digits - 1]
            names = [found[1] for found in asked]
            known = [sum(place < found.start() for place, _ in said.values()) for found in asked]
            changes += sum(a != b for a, b, n in zip(names, names[1:], known) if n > 1)
            kept += sum(a == b for a, b, n in zip(names, names[1:], known) if n > 1)
            late += sum(place > asked[0].start() for place, _ in said.values())
            assert np.count_nonzero(answer) <= 6 * len(asked) + 6  # nothing else is an answer; the row's end may cut the last
    assert changes > kept > 0  # uniform among three or four, not in turn
    assert late > 0  # names that come later are not asked before
