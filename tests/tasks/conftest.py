"""Models that know a task by heart, to test the ruler and not the ruled; books to read."""

import json
import random
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from infini.data.tokenizer import ByteTokenizer


@dataclass(frozen=True)
class _Text:
    """The oracle's state: all it has read, one string per row."""

    rows: tuple[str, ...]

    @property
    def batch_size(self):
        return len(self.rows)

    @property
    def nbytes(self):
        return sum(map(len, self.rows))

    @property
    def tokens_seen(self):
        return torch.tensor([len(row) for row in self.rows])

    def detach(self):
        return replace(self)

    def select(self, rows):
        return replace(self, rows=tuple(self.rows[i] for i in rows.tolist()))


class PasskeyOracle(torch.nn.Module):
    """Writes `` KEY.`` after the question; ``spoil(key) -> str`` changes what it believes the key to be.

    It repeats what it has *written*, digit after digit: after one wrong digit it is lost, as a real
    model may be. So a benchmark that feeds it the right digits would find a better score.
    """

    def __init__(self, spoil=lambda key: key, segment_length=64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=256, segment_length=segment_length)
        self.spoil = spoil
        self.calls = 0

    def init_state(self, batch_size, device=None):
        return _Text(("",) * batch_size)

    def state_bytes(self, tokens, batch_size=1):
        return tokens * batch_size

    def forward(self, tokens, state=None, *, reset=None, padding=None, keep="all", hidden=False):
        self.calls += 1
        state = state or self.init_state(len(tokens))
        rows = tuple(old + bytes(new).decode("latin-1") for old, new in zip(state.rows, tokens.tolist()))
        logits = torch.zeros(len(rows), 1, 256)
        for row, text in enumerate(rows):
            logits[row, 0, ord(self._next(text))] = 1.0 + self.weight.item()
        return logits, _Text(rows)

    def _next(self, text):
        before, asked, written = text.rpartition("What is the pass key? The pass key is")
        if not asked:
            return "?"
        said = " " + self.spoil(re.search("The pass key is ([0-9]+)", before)[1]) + "."
        return said[len(written)] if said.startswith(written) and written != said else "?"


@pytest.fixture
def oracle():
    return PasskeyOracle


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


def made_book(seed, people, places, count=300):
    """A book that says something else of everybody in every sentence."""
    draw = random.Random(seed)
    things = "a lamp,an oar,a kettle,a brass key,two coats,the wet map,some rope,a small drum,bread and salt,the blue flag".split(",")
    lines = []
    for i in range(count):
        who, other, place = draw.choice(people), draw.choice(people), draw.choice(places)
        thing, hour = draw.choice(things), i + 100 * seed
        lines.append(f"At hour {hour} of the watch it was, as we all knew, {who} who had carried {thing} down to the old boats.")
        lines.append(f"“That was hour {hour},” said {other}, and so the rest of us went home at last from {place} without {thing}.")
    return "\n\n".join(" ".join(lines[i : i + 6]) for i in range(0, len(lines), 6)) + "\n"


@pytest.fixture(scope="session")
def library():
    """Three books by name: their texts and their summaries."""
    names = {
        "sea": (["Ahab", "Starbuck", "Queequeg"], ["Nantucket", "Bedford"]),
        "moor": (["Cathy", "Heathcliff", "Linton"], ["Gimmerton", "Liverpool"]),
        "road": (["Pip", "Joe", "Magwitch", "Estella"], ["Rochester", "London"]),
    }
    texts = {name: made_book(i, *parts, count=60 + 20 * i) for i, (name, parts) in enumerate(names.items())}
    summaries = {
        "sea": "Ahab sails from Nantucket with Starbuck.\n\nNobody comes home.",
        "moor": "Cathy dies. Heathcliff digs at Gimmerton.",
        "road": "Pip meets Magwitch <before> he goes to London & back.",
    }
    return texts, summaries


@pytest.fixture
def pair_files(library, tmp_path):
    """The library as two tables."""
    texts, summaries = library
    for name, column, values in (("books", "text", texts), ("summaries", "summary", summaries)):
        rows = [json.dumps({"id": book, column: value}) for book, value in values.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return {"pairs": (str(tmp_path / "summaries.jsonl"),), "books": (str(tmp_path / "books.jsonl"),)}


class BookOracle(PasskeyOracle):
    """Has every book in mind that it reads: fills blanks by looking them up, and writes the summary that belongs to the text before it.

    Args:
        summaries: by the first 40 letters of their books.
        knows: False for one that has read nothing and finds every byte equally likely.
    """

    def __init__(self, summaries, knows=True, segment_length=64):
        super().__init__(segment_length=segment_length)
        self.config.num_hidden_layers, self.config.tokenizer = 1, "bytes"
        self.summaries, self.knows = summaries, knows

    def forward(self, tokens, state=None, *, reset=None, padding=None, keep="all", hidden=False, targets=None, memory=True):
        state = state or self.init_state(len(tokens))
        real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else ~padding
        rows, logits = [], torch.zeros(*tokens.shape, 256)
        for i, (text, ids) in enumerate(zip(state.rows, tokens.tolist())):
            for t, byte in enumerate(ids):
                if real[i, t]:
                    text += chr(byte)
                    if (keep == "all" or t == int(real[i].nonzero().max())) and memory and self.knows:
                        if (said := self._next(text)) is not None:
                            logits[i, t, said] = 9.0
            rows.append(text)
        if keep == "last":
            last = (real * torch.arange(1, tokens.shape[1] + 1)).argmax(dim=1)
            logits = logits[torch.arange(len(rows)), last].unsqueeze(1)
        if targets is not None:
            logits = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").masked_fill(~real, 0)
        return (None if keep == "none" else logits), _Text(tuple(rows))

    def _next(self, text):
        book, asked, rest = text.rpartition("\n\n? ")
        if asked and "\n=" in rest and "###" not in rest:
            passage, _, written = rest.partition("\n=")
            before, _, behind = passage.partition("_")
            found = re.search(re.escape(before) + r"([^.]{1,30}?)" + re.escape(behind), book)
            words = before.split(" ")
            said = f" {' '.join(words[-9 if before.endswith(' ') else -8 :])}{found[1]}\n" if found else ""
        elif "\n\n### Summary of the book\n\n" in text:
            book, _, written = text.rpartition("\n\n### Summary of the book\n\n")
            said = self.summaries.get(book[:40], "") + "\n###"
        else:
            return None
        return ord(said[len(written)]) if said.startswith(written) and len(written) < len(said) else None


@pytest.fixture
def book_oracle(library):
    texts, summaries = library
    by_start = {texts[name].encode().decode("latin-1")[:40]: summaries[name] for name in texts}
    return lambda **options: BookOracle(by_start, **options)
