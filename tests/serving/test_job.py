"""What a job tells, piece by piece: whole characters, nothing of a stop string, every token once."""

from __future__ import annotations

import random

import pytest

from eellm.decoding.continuation import Request, Token
from eellm.serving.job import Event, Finish, Job, Piece
from tests.decoding.test_generation import tokenizer

TEXT = "naïve 你好, 🙂🙃 == 'ENDE' END EN\n\nEND OF 🙂"
TOKENIZER = tokenizer()


def told(text: str, stops: list[str]) -> tuple[list[Piece], Finish, list[int]]:
    """All that is heard of a job whose tokens spell a text, and the ids of its tokens."""
    events: list[Event] = []
    ids = TOKENIZER.encode(text)
    job = Job("full", [5], Request(len(ids)), stops, "client", 0.0, events.append)
    job.begin(TOKENIZER)
    for place, id_ in enumerate(ids):
        job.add(Token(id_, "final", 4, 0.5, -0.7), "length" if place == len(ids) - 1 else None)
    *pieces, end = events
    assert isinstance(end, Finish)
    return pieces, end, ids


def first_stop(text: str, stops: list[str]) -> int:
    """Where the stop string begins that is complete first; of several, the first one in the text."""
    for length in range(len(text) + 1):
        found = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if found:
            return min(found)
    return len(text)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_the_text_up_to_the_stop_string(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices(TEXT, k=60)) + TEXT
    stops = [text[start : start + draw.randint(1, 5)] for start in draw.sample(range(40, 90), draw.randint(0, 3))]
    pieces, end, ids = told(text, stops)
    cut = first_stop(text, stops)
    assert "".join(piece.text for piece in pieces) == text[:cut]
    assert not any("\ufffd" in piece.text for piece in pieces)
    said = [said for piece in pieces for said in piece.said]
    assert "".join(one.text for one in said) == text[:cut]
    assert [one.token.id for one in said] == ids[: len(said)]
    assert (end.reason, end.tokens <= len(ids)) == ("stop" if cut < len(text) else "length", True)
    if not stops:
        assert (len(said), end.tokens) == (len(ids), len(ids))


def test_what_may_begin_a_stop_string_waits_and_nothing_else_does() -> None:
    pieces, _, _ = told("a = 'EN' END", ["END"])
    assert "".join(piece.text for piece in pieces) == "a = 'EN' "
    assert all(not "END".startswith(piece.text[-2:]) or piece is pieces[-1] for piece in pieces if piece.text.endswith("EN"))
    assert len(pieces) >= 4


def test_a_character_that_never_ends_is_told_at_the_end() -> None:
    events: list[Event] = []
    first_byte = TOKENIZER.encode("🙂")[0]
    job = Job("full", [5], Request(1), [], "client", 0.0, events.append)
    job.begin(TOKENIZER)
    job.add(Token(first_byte, "final", 4, 0.5, -0.7), "length")
    assert events[0].text == "\ufffd"
    assert events[1] == Finish("length", 1)
