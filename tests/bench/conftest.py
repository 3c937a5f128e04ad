"""What tests of the benchmark share."""

import pytest

from infini.bench.trial import Ceilings, measure


@pytest.fixture
def rows_of():
    """Measures the trials of a part once each, as the benchmark does, and gives their rows."""

    def run(trials, device):
        rows = []
        try:
            one = next(trials)
            while True:
                rows.append(measure(one, device, Ceilings(1e9, 1e12), 1, 0.001))
                one = trials.send(rows[-1])
        except StopIteration:
            return rows

    return run
