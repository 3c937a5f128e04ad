"""What is hidden and how it is asked for: one kind of needle per wording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from infini.tasks.passkey.keys import draw_keys

from infini.errors import InputError

# The wording of the Landmark attention code (arXiv 2305.16300), which the Infini-attention paper
# prints too. The parts are joined with newlines.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Decoy:
    """A statement that a prompt does not end by asking for.

    Attributes:
        text: the statement.
        place: 0..1, its place in the filler.
        before: the place is a share of the filler before the needle, not of the whole filler.
        question: what it answers; a training row may ask that on its way. None: never asked.
        key: the number that it holds then.
    """

    text: str
    place: float
    before: bool = False
    question: str | None = None
    key: int | None = None

    def offset(self, before: int, filler: int) -> int:
        """Tokens of filler before it, of ``filler`` in all and ``before`` before the needle."""
        return round(self.place * (before if self.before else filler))


@dataclass(frozen=True)
class Quiz:
    """The texts of one prompt, all but the filler; the answer is a space and the number.

    Attributes:
        needle: the statement that holds the number.
        question: ends the prompt.
        task: begins it.
        decoys: other statements.
    """

    needle: str
    question: str = QUESTION
    task: str = TASK
    decoys: tuple[Decoy, ...] = ()


@dataclass(frozen=True)
class NeedleKind:
    """A way to hide a number.

    Attributes:
        draw: ``(random, key, held_out) -> Quiz``; any other number in the quiz has as many digits as
            the key, differs from it, and is on the side ``held_out`` of the split of the keys.
        digits: of a key, where nothing else is asked for.
        filler: the sentences of the haystack ``repeat``.
        trained: False: for measurement only, training refuses it.
    """

    draw: Callable[[np.random.Generator, int, bool], Quiz]
    digits: int = 5
    filler: str = FILLER
    trained: bool = True


def needle_kind(name: str) -> NeedleKind:
    """The kind of that name.

    Raises:
        InputError: there is none.

    Example:
        >>> needle_kind("passkey").draw(np.random.default_rng(0), 12345, True).needle
        'The pass key is 12345. Remember it. 12345 is the pass key.'
    """
    if name not in NEEDLES:
        raise InputError(f"needle is {name!r}; use one of {', '.join(NEEDLES)}")
    return NEEDLES[name]


def _passkey(random: np.random.Generator, key: int, held_out: bool) -> Quiz:
    return Quiz(NEEDLE.format(key=key))


_NAMES = (
    *("ALICE", "BORIS", "CLARA", "DAVID", "EMILY", "FRANK", "GRACE", "HENRY"),
    *("IRENE", "JAMES", "KAREN", "LEWIS", "MARIA", "NIGEL", "OSCAR", "PETRA"),
)
_NAMED = "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}."
_NAMED_QUESTION = "What is the pass key of {name}? The pass key of {name} is"


def _competing(count: int) -> NeedleKind:
    """``count`` people have a pass key each; one is asked for, the others stand anywhere."""

    def draw(random: np.random.Generator, key: int, held_out: bool) -> Quiz:
        asked, *others = random.choice(_NAMES, count, replace=False).tolist()
        keys = _other_keys(random, key, count - 1, held_out)
        decoys = tuple(
            Decoy(_NAMED.format(name=name, key=other), place, question=_NAMED_QUESTION.format(name=name), key=other)
            for name, other, place in zip(others, keys, random.random(count - 1), strict=True)
        )
        return Quiz(
            _NAMED.format(name=asked, key=key), _NAMED_QUESTION.format(name=asked), decoys=decoys
        )

    return NeedleKind(draw)


_CHANGED = "The pass key has changed. The pass key is now {key}. Remember it. {key} is the pass key."


def _updated(random: np.random.Generator, key: int, held_out: bool) -> Quiz:
    """A pass key is said, and later another; the last one counts."""
    (first,) = _other_keys(random, key, 1, held_out)
    return Quiz(
        _CHANGED.format(key=key),
        decoys=(Decoy(NEEDLE.format(key=first), random.random(), before=True),),
    )


WORDINGS = (
    (
        "The secret code is {key}. Keep it in mind: {key} is the secret code.",
        "Which secret code were you given? The secret code is",
    ),
    (
        "To open the safe, dial {key}. Nothing but {key} opens the safe.",
        "What do you dial to open the safe? To open the safe, dial",
    ),
    (
        "My locker has the number {key}. Please do not forget that my locker is {key}.",
        "Which number does my locker have? My locker has the number",
    ),
    (
        "Write this down: {key} is the password. Again, the password is {key}.",
        "Tell me the password. The password is",
    ),
    (
        "The train that you have to take is number {key}. Take number {key} and no other train.",
        "Which train do you have to take? You have to take number",
    ),
    (
        "Her telephone extension is {key}. If you want to call her, ask for {key}.",
        "What is her telephone extension? Her telephone extension is",
    ),
)


def _wording(random: np.random.Generator, key: int, held_out: bool) -> Quiz:
    """The same question in other words, which no training uses."""
    needle, question = WORDINGS[random.integers(len(WORDINGS))]
    return Quiz(needle.format(key=key), question)


# RULER's niah_single_1 (arXiv 2404.06654): its sentences with one needle, one value and one query,
# the haystack's sentences one block a line, names of an adjective and a noun. The two word lists are
# this project's own.
_RULER_TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
_RULER_NEEDLE = "One of the special magic numbers for {name} is: {key}."
_RULER_QUESTION = (
    "What is the special magic number for {name} mentioned in the provided text? "
    "The special magic number for {name} mentioned in the provided text is"
)
_RULER_FILLER = FILLER.strip() + "\n"
_ADJECTIVES = (
    "ancient bitter blue brave bright broken calm careful clever cloudy cold curious dark deep dusty eager "
    "early empty faint famous fierce flat fresh gentle golden grand hollow honest hungry icy idle jolly "
    "kind late lazy little lonely loud lucky mellow merry misty modest muddy narrow noble odd pale patient "
    "plain polite proud purple quick quiet rapid red rough round rusty salty shallow sharp shiny silent "
    "simple sleepy slow smooth soft solid sour stormy strange sunny sweet swift tall tender tidy tiny warm "
    "wild wise wooden young"
).split()
_NOUNS = (
    "acorn anchor apple arrow badge banner barrel basket beacon bell bench bottle branch bridge bucket "
    "button cabin camel candle canoe castle chair cherry circle clock cloud comet copper corner cottage "
    "cousin cradle desert dragon drum eagle engine falcon feather fiddle forest fountain garden glacier "
    "goose hammer harbor helmet island jacket kettle ladder lantern lemon letter lion market meadow mirror "
    "monkey mountain needle ocean orchard otter paper pencil pepper pillow planet pocket puzzle rabbit "
    "ribbon river rocket saddle sailor shadow signal spider spoon statue table temple thunder tiger tower "
    "tunnel turtle valley violin wagon walnut whistle window"
).split()


def _niah_single_1(random: np.random.Generator, key: int, held_out: bool) -> Quiz:
    name = f"{random.choice(_ADJECTIVES)}-{random.choice(_NOUNS)}"
    return Quiz(
        _RULER_NEEDLE.format(name=name, key=key), _RULER_QUESTION.format(name=name), _RULER_TASK
    )


_LINKS = "is was has of for in at with to by from under number".split()
_SAID = ("Remember it.", "Again: {phrase} {key}.", "{key} it is.", "{phrase} {key} and nothing else.", "Keep {key} in mind.")
_SAID_QUESTION = ("What was it? {phrase}", "And now again: {phrase}", "Tell me the number. {phrase}")


def _phrase(random: np.random.Generator, key: int, held_out: bool) -> Quiz:
    """One to four numbers, each after words that hardly ever come twice; the words are repeated and one number is asked for.

    No fixed sentence can be learned from it, only that a number belongs to the words before it.
    """
    count = int(random.integers(1, 4, endpoint=True))
    phrases: list[str] = []
    while len(phrases) < count:
        words = random.choice(_ADJECTIVES + _NOUNS, int(random.integers(2, 3, endpoint=True))).tolist()
        words.insert(int(random.integers(1, len(words), endpoint=True)), str(random.choice(_LINKS)))
        phrases.append(" ".join(["The", *words]))
        phrases = list(dict.fromkeys(phrases))

    def said(phrase: str, number: int) -> str:
        after = _SAID[random.integers(len(_SAID))].format(phrase=phrase, key=number)
        return f"{phrase} {number}. {after}"

    keys = [key, *_other_keys(random, key, count - 1, held_out)]
    needle, *others = (said(phrase, number) for phrase, number in zip(phrases, keys, strict=True))
    asking = _SAID_QUESTION[random.integers(len(_SAID_QUESTION))]
    decoys = (
        Decoy(text, place, question=asking.format(phrase=phrase), key=other)
        for text, place, phrase, other in zip(others, random.random(count - 1), phrases[1:], keys[1:], strict=True)
    )
    return Quiz(needle, asking.format(phrase=phrases[0]), decoys=tuple(decoys))


def _other_keys(random: np.random.Generator, key: int, count: int, held_out: bool) -> list[int]:
    """Numbers of as many digits that differ from ``key`` and from each other."""
    keys = [key]
    while len(keys) <= count:
        other = int(draw_keys(random, 1, len(str(key)), held_out)[0])
        if other not in keys:
            keys.append(other)
    return keys[1:]


NEEDLES = {
    "passkey": NeedleKind(_passkey),
    "competing_4": _competing(4),
    "competing_8": _competing(8),
    "updated": NeedleKind(_updated),
    "wording": NeedleKind(_wording, trained=False),
    "phrase": NeedleKind(_phrase),
    "niah_single_1": NeedleKind(_niah_single_1, digits=7, filler=_RULER_FILLER),
}
