"""Messages among other lines, and lines out of pieces."""

import random

from mellow_ds.launcher.wire import Lines, decode, encode


def test_a_message_survives_whatever_is_in_it() -> None:
    message = {"is": "line", "text": 'a "b"\n\x1e\r \u00e4', "rank": 3}
    line = encode(message, marked=True)
    assert line.count(b"\n") == 1
    assert decode(line.rstrip(b"\n")) == message


def test_what_a_login_shell_prints_is_no_message() -> None:
    for line in (b"Welcome to node1", b'{"is": "ready"}', b"\x1e{half", b"\x1e[1, 2]", b""):
        assert decode(line) is None


def test_lines_do_not_depend_on_where_the_stream_was_cut() -> None:
    stream = b"one\ntwo\r\nbar 1\rbar 2\r\n\nlast\r"
    expected = [b"one", b"two", b"bar 1", b"bar 2", b"", b"last"]
    dice = random.Random(1)
    for _ in range(200):
        lines, found, left = Lines(), [], stream
        while left:
            cut = dice.randint(1, 4)
            found += lines.add(left[:cut])
            left = left[cut:]
        assert found + lines.rest() == expected


def test_a_line_without_an_end_is_cut_and_an_order_is_not() -> None:
    assert Lines(max_bytes=8).add(b"x" * 20) == [b"x" * 20]
    orders = Lines(max_bytes=0, only_newlines=True)
    assert orders.add(b"x" * 200_000) == []
    assert orders.add(b"\r\n") == [b"x" * 200_000 + b"\r"]
