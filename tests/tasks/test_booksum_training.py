"""Books with their summaries as training batches: what is read, what is an answer, where windows end, and that a run goes on exactly."""

import pickle

import pytest
import torch
from infini.tasks.booksum.asking import NEAREST
from infini.tasks.booksum.prompt import END, SUMMARY_PROMPT
from infini.tasks.booksum.training import BookSummaries

from infini import InfiniConfig, InfiniTransformer
from infini.data.tokenizer import ByteTokenizer
from infini.errors import InputError
from infini.train import TrainSettings, train
from infini.train.replay import Replay
from infini.train.step import Parallel

SHAPE = dict(segment_length=64, segments=8, rows=2)


@pytest.fixture
def source(pair_files):
    return lambda steps=60, **more: BookSummaries(**pair_files, **{**SHAPE, "steps": steps, **more})


def lanes(source):
    """Tokens, answers and resets of every row, from the first step to the last; each step goes on where the last one ended."""
    for row in range(source.rows):
        for stream in range(source.streams):
            steps = [source[step] for step in range(stream, len(source), source.streams)]
            assert all(batch.stream == stream and batch.segments == source.segments for batch in steps)
            for one, other in zip(steps, steps[1:]):
                assert one.tokens[row, -1] == other.tokens[row, 0]
                assert not other.answer[row, 0] and not other.reset[row, 0]
            yield tuple(torch.cat([getattr(batch, name)[row, 1:] for batch in steps]) for name in ("tokens", "answer", "reset"))


def texts(tokens, answer, reset):
    """Each text of a lane with its mask of answers; the last is cut off, and left out."""
    starts = reset.nonzero().flatten().tolist()
    for start, stop in zip(starts, starts[1:]):
        yield bytes(tokens[start:stop].tolist()).decode(errors="replace"), answer[start:stop], stop


def test_answers_are_the_summaries_and_nothing_else(source, library):
    books, summaries = library
    read = []
    for lane in lanes(source(steps=300)):
        for text, answer, stop in texts(*lane):
            if name := next((name for name in books if text.startswith(books[name][:300])), None):
                assert text == books[name] + SUMMARY_PROMPT + summaries[name] + END
                assert bytes(text.encode()[i] for i in answer.nonzero().flatten()).decode() == summaries[name] + END
                assert stop % (8 * 64) == 0  # a window ends with the summary
                read.append(name)
            else:  # a passage from a book, to fill its window
                assert not answer.any() and any(text.strip("�") in book for book in books.values())
    assert {name: read.count(name) >= 2 for name in books} == dict.fromkeys(books, True)


def test_each_epoch_of_a_row_has_every_book_once_in_an_order_of_its_own(source, library):
    orders = []
    for lane in lanes(source(steps=500, rows=1, streams=2)):
        found = [name for text, _, _ in texts(*lane) for name in library[0] if text.startswith(library[0][name][:300])]
        assert all(sorted(found[i : i + 3]) == sorted(library[0]) for i in range(0, len(found) // 3 * 3, 3))
        orders.append(found)
    assert len(orders[0]) >= 6 and orders[0] != orders[1]


def test_the_end_of_the_book_is_in_the_window_of_its_summary(source, library):
    room = max(len((SUMMARY_PROMPT + summary + END).encode()) for summary in library[1].values())
    needed = 3 + -(-room // 64)
    assert len(source(segments=needed, book_segments=3)) == 60
    with pytest.raises(InputError, match=f"use segments={needed} or more"):
        source(segments=needed - 1, book_segments=3)


def test_the_first_part_of_a_book_and_a_cut_summary(source, library):
    """With ``book_tokens`` the first ones are read; a summary cut to ``summary_tokens`` has no end."""
    books, summaries = library
    for text, answer, _ in texts(*next(lanes(source(book_tokens=1000, summary_tokens=20)))):
        if SUMMARY_PROMPT in text:
            book, _, summary = text.partition(SUMMARY_PROMPT)
            name = next(name for name in books if books[name].startswith(book[:900]))
            assert book.encode() == books[name].encode()[:1000] or "�" in book
            assert summary == summaries[name][:20] and int(answer.sum()) == 20


def questions(text, answer):
    """Of each question in a text: the bytes of the book before it, where its sentence ends in them, and the sentence; asked as it should be."""
    data, book, last = text.encode(), b"", 0
    edges = torch.diff(answer.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32)).nonzero().flatten().tolist()
    for start, stop in zip(edges[::2], edges[1::2]):
        asked = max(data.rfind(mark, last, start) for mark in (b"\n\n? ", b"\n\n> "))
        book += data[last:asked]
        if data[asked + 2 : asked + 4] == b"> ":
            sentence = data[asked + 4 : stop - 1]
            assert len(data[asked + 4 : start].split()) == 6 and data[stop - 1 : stop] == b"\n" and len(data[start:stop].split()) >= 6
            yield book, book.rindex(sentence) + len(sentence), sentence
            last = stop
            continue
        passage, _, again = data[asked + 4 : start].partition(b"\n=")
        before, gap, behind = passage.partition(b"_")
        name = data[start:stop].removeprefix(b" ").removesuffix(b"\n")
        assert data[start:stop].endswith(b"\n") and gap and len(again.split()) <= 8 and (b" " + before).rstrip(b" ").endswith(again)
        assert (b" " + before).endswith(again + data[start:stop].removesuffix(name + b"\n"))
        assert len(again.split()) == 8 or again.strip() == before.strip()
        sentence = before + name + behind
        yield book, book.rindex(sentence) + len(sentence), sentence
        last = stop


def test_questions_are_about_what_was_read_and_only_names_are_answers(source, library):
    found = []
    for lane in lanes(source(steps=120, cloze_share=1.0, book_tokens=4000)):
        for text, answer, stop in texts(*lane):
            asked = list(questions(text, answer)) if "�" not in text else []
            if asked:
                book, _, _ = asked[-1]
                assert stop % (8 * 64) == 0 and SUMMARY_PROMPT not in text and any(book.decode() in whole for whole in library[0].values())
                assert all(len(book) == len(asked[0][0]) for book, _, _ in asked)  # all of them behind it
                assert len(text.encode()) - len(book) <= 7 * 64
                assert len({sentence for _, _, sentence in asked}) == len(asked)
                found += asked
    assert len(found) > 30


def test_questions_on_the_way_ask_for_what_was_read_by_then(source):
    """From near to far, evenly in the logarithm, about as many as asked for."""
    on_the_way, away, asked_bytes, read = 0, [], 0, 0
    for lane in lanes(source(steps=400, cloze_share=1.0, question_share=0.4)):
        for text, answer, _ in texts(*lane):
            asked = list(questions(text, answer)) if "�" not in text else []
            if asked:
                whole = len(asked[-1][0])
                on_the_way += sum(len(book) < whole for book, _, _ in asked)
                assert all(book.endswith(b"\n") for book, _, _ in asked if len(book) < whole)
                away += [len(book) - end for book, end, _ in asked if len(book) > 4000]
                assert len({sentence for _, _, sentence in asked}) == len(asked)
                asked_bytes, read = asked_bytes + len(text.encode()) - whole, read + len(text.encode())
    assert on_the_way > 100 and 0.2 < asked_bytes / read < 0.5
    assert NEAREST - 4 <= min(away) < 200 and max(away) > 4000  # bytes of letters that take three shift places by a few
    near, far = (sum(low <= distance < 5 * low for distance in away) for low in (5 * NEAREST, 25 * NEAREST))
    assert 0.5 < far / near < 2


def test_questions_grow_more_distant_and_recitals_give_way_to_names(source):
    """At the start they are near and ask to recite; from half of training on as far as the book is long, and for names."""
    found = {False: [], True: []}
    whole = source(steps=400, cloze_share=1.0, question_share=0.5, farthest_start=600, recital_share_start=1.0, book_tokens=4000)
    for row in range(2):
        for late, steps in ((False, range(40)), (True, range(200, 400))):
            lane = tuple(torch.cat([getattr(whole[step], name)[row, 1:] for step in steps]) for name in ("tokens", "answer", "reset"))
            for text, answer, _ in texts(*lane):
                if "�" not in text:
                    found[late] += [(len(book) - end, f"\n\n> {sentence.decode()}\n" in text) for book, end, sentence in questions(text, answer)]
    assert len(found[False]) > 20 and max(distance for distance, _ in found[False]) < 900 and all(recited for _, recited in found[False][:9])
    assert max(distance for distance, _ in found[True]) > 3000 and not any(recited for _, recited in found[True][20:])


def test_a_share_of_the_visits_ends_with_questions(source):
    found = [text for lane in lanes(source(steps=240, cloze_share=0.5, book_tokens=4000)) for text, _, _ in texts(*lane)]
    visits = [text for text in found if "###" in text or "\n\n? " in text]
    kinds = [SUMMARY_PROMPT in text for text in visits]
    assert 0.2 < sum(kinds) / len(kinds) < 0.8 and len(kinds) > 20


def test_a_row_knows_nothing_before_its_first_token(source):
    first, second = source()[0], source()[1]
    assert first.reset[:, 0].all() and first.reset[:, 1].all() and not second.reset[:, 0].any()


@pytest.mark.parametrize("cloze_share", [0.0, 0.5])
def test_a_batch_depends_on_its_step_alone(source, cloze_share):
    one, other = source(cloze_share=cloze_share, streams=2), pickle.loads(pickle.dumps(source(cloze_share=cloze_share, streams=2)))
    there = [one[step] for step in range(60)]
    for step in (59, 3, 30, 31, 0):
        for name in ("tokens", "answer", "reset"):
            assert torch.equal(getattr(there[step], name), getattr(other[step], name)), (step, name)
    assert not torch.equal(there[0].tokens, source(seed=1)[0].tokens)
    with pytest.raises(IndexError):
        one[60]


def test_processes_read_rows_of_their_own(source):
    together = source(rows=4)
    parts = [source(rows=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in (0, 7, 40):
        assert torch.equal(torch.cat([part[step].tokens for part in parts]), together[step].tokens)


def model():
    torch.manual_seed(0)
    return InfiniTransformer(InfiniConfig.long(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, segment_length=64))


def test_a_stopped_run_goes_on_exactly(source, tmp_path):
    class Stops:
        """The source, until step 5 is asked for: as if the machine had died."""

        def __init__(self, whole):
            self.whole, self.digests = whole, {}

        def __len__(self):
            return len(self.whole)

        def __getitem__(self, step):
            if step == 5 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                raise RuntimeError("the machine died")
            return self.whole[step]

    settings = TrainSettings(steps=9, warmup_steps=1, checkpoint_every=4, workers=0, precision="fp32", device="cpu")
    straight, stopped = model(), model()
    (tmp_path / "died").touch()
    train(straight, Stops(source(steps=9)), settings, tmp_path / "straight")
    (tmp_path / "died").unlink()
    with pytest.raises(RuntimeError, match="the machine died"):
        train(stopped, Stops(source(steps=9)), settings, tmp_path / "stopped")
    train(again := model(), Stops(source(steps=9)), settings, tmp_path / "stopped")
    assert all(torch.equal(one, other) for one, other in zip(straight.parameters(), again.parameters()))


def test_replay_gives_the_gradient_of_the_whole_window(source):
    """Also where texts begin inside it, and after a state of steps before."""
    whole, batches = model().double(), [source()[step] for step in range(3)]

    def gradients(schedule):
        state = None
        for batch in batches:
            whole.zero_grad()
            _, state = schedule.learn(whole, batch.to("cpu"), lambda sums: sums.tokens + sums.answers, state)
            state = state.detach()
        return [parameter.grad.clone() for parameter in whole.parameters() if parameter.grad is not None]

    parts = zip(gradients(Parallel()), gradients(Replay(64, 2)), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-8, atol=1e-8) for one, other in parts)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"cloze_share": 1.5}, "cloze_share is 1.5; it is a share"),
        ({"question_share": 1.0}, "question_share is 1.0; it is a share of what is read, from 0 to 0.9"),
        ({"growth": -0.1}, "growth is -0.1; it is a share"),
        ({"farthest_start": 16}, "farthest_start is 16; no question is nearer than 16 tokens: raise it"),
        ({"book_tokens": 63}, "book_tokens is 63; a memory is of no use in less than a segment"),
        ({"rank": 1}, "rank is 1 of 1 processes"),
        ({"seed": -1}, "seed is -1"),
        ({"segment_length": 10**6, "book_segments": 1}, "the book 'sea' has .* tokens, less than a segment .1000000."),
    ],
)
def test_mistakes(source, asked, message):
    with pytest.raises(InputError, match=message):
        source(**asked)


def test_digests_name_what_is_read(source, pair_files):
    assert source().digests["pairs_read"] == 3 and len(source().digests["pairs_sha256"]) == 64
    assert source().digests == source(seed=4).digests
    assert source().tokenizer == "bytes" and source()[0].tokens.dtype == torch.uint8
    assert ByteTokenizer.fingerprint is None and "tokenizer_sha256" not in source().digests
