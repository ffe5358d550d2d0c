"""Who said what, and what is left when the oldest is forgotten."""

import pytest

from bayes_dispatch.inference.chat.state import Transcript
from bayes_dispatch.model.backbone import Tokens

AB = ((0, 1), (1, 2))


def bytewise(transcript: Transcript, data: bytes, own: bool) -> Transcript:
    return transcript.followed_by(tuple(data), [(n, n + 1) for n in range(len(data))], data, own=own, user=not own)


@pytest.mark.parametrize(
    ("data", "most", "left"),
    [
        (b"ab\ncdefgh", 9, b"ab\ncdefgh"),
        (b"ab\ncdefgh", 8, b"cdefgh"),  # from the beginning of the next line
        (b"ab\ncdefgh", 6, b"cdefgh"),  # that begins just there
        (b"ab\ncdefgh", 5, b"defgh"),  # there is no other
        (b"abcdefg\nh", 8, b"bcdefg\nh"),  # it would leave less than half
        (b"abcdefg\n", 4, b"efg\n"),
        ("aéé\n".encode(), 4, "é\n".encode()),
        (b"\x80\x80\n\x80\x80", 5, b"\x80\x80\n\x80\x80"),
        (b"\x80\x80\n\x80\x80", 3, b"\x80\x80"),  # of the model's own, which need be no UTF-8
        (b"a\n\n\nb", 4, b"\n\nb"),
        (b"ab", 0, b""),
    ],
)
def test_what_is_left(data: bytes, most: int, left: bytes) -> None:
    transcript = bytewise(bytewise(Transcript.empty(), data[:1], own=False), data[1:], own=True)
    found = transcript.last(most)
    assert found.data == bytes(found.ids.tolist()) == left
    assert found.own.tolist() == transcript.own.tolist()[len(data) - len(left) :]
    assert len(found) <= most


def test_what_is_left_of_tokens() -> None:
    """A line begins with a token; a character of several tokens stays whole; a template's turn is better than both."""
    heard = Transcript.empty().followed_by((7, 8, 9, 9, 9), [(0, 3), (3, 4), (4, 8), (4, 8), (4, 8)], "ab \n𝄞".encode())
    assert [heard.last(most).ids.tolist() for most in (4, 3, 2, 1)] == [[9, 9, 9], [9, 9, 9], [], []]
    replied = (
        heard.followed_by((1, 2), [(0, 1), (1, 1)], b"c", own=True)
        .followed_by((3, 4))
        .followed_by((5,), [(0, 2)], b"de")
    )
    assert (replied.last(6).ids.tolist(), replied.last(6).data) == ([3, 4, 5], b"de")
    assert (replied.last(7).ids.tolist(), replied.last(7).spans[0].tolist()) == ([1, 2, 3, 4, 5], [0, 1])


def test_the_users_words() -> None:
    begun = Transcript.empty().followed_by((9,)).followed_by((5, 6), AB, b"ab", user=True).followed_by((8,))
    transcript = begun.followed_by((1,), [(0, 2)], b"cd", own=True).followed_by((7,), [(0, 1)], b"e", user=True)
    assert transcript.data == b"abcde"
    assert transcript.said == (b"abe", Tokens((5, 6, 7), ((0, 1), (1, 2), (2, 3))))
    assert Transcript.empty().said == (b"", Tokens((), ()))
