"""Who said what, and what is left when the oldest is forgotten."""

import pytest

from bayes_dispatch.inference.chat.state import Transcript


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
    transcript = Transcript.empty().followed_by(data[:1], own=False).followed_by(data[1:], own=True)
    found = transcript.last(most)
    assert found.data == left
    assert found.own.tolist() == transcript.own.tolist()[len(data) - len(left) :]
    assert len(found) <= most


def test_the_users_bytes() -> None:
    transcript = (
        Transcript.empty().followed_by(b"ab", own=False).followed_by(b"cd", own=True).followed_by(b"e", own=False)
    )
    assert (transcript.data, transcript.user) == (b"abcde", b"abe")
    assert Transcript.empty().user == b""
