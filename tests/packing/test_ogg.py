"""Ogg pages: the checksum is Ogg's, two writings of the same sound become the same bytes."""

import io

import numpy as np
import pytest
import soundfile

from mellow_ds.packing.ogg import ogg_crc, with_fixed_serial


def bitwise_crc(page: bytes) -> int:
    """The CRC of RFC 3533 by its definition: a bit at a time, highest first."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
            crc &= 0xFFFFFFFF
    return crc


def opus(seconds: float = 1.3) -> bytes:
    buffer = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(round(48_000 * seconds)) * 0.05)
    soundfile.write(buffer, wave, 48_000, format="OGG", subtype="OPUS")
    return buffer.getvalue()


def test_the_checksum_is_that_of_the_definition() -> None:
    for size in (0, 1, 4, 27, 1_000):
        page = np.random.default_rng(size).bytes(size)
        assert ogg_crc(page) == bitwise_crc(page)


def test_the_checksum_is_the_one_that_libsndfile_writes() -> None:
    page = bytearray(opus()[: 28 + 19])  # the first page: header, one segment of 19 bytes
    written = int.from_bytes(page[22:26], "little")
    page[22:26] = bytes(4)
    assert ogg_crc(bytes(page)) == written != 0


def test_two_writings_become_the_same_bytes_and_the_same_sound() -> None:
    first, second = opus(), opus()
    assert first != second, "libsndfile draws a serial number"
    assert with_fixed_serial(first) == with_fixed_serial(second)
    sounds = [soundfile.read(io.BytesIO(payload), dtype="int16")[0] for payload in (first, with_fixed_serial(first))]
    np.testing.assert_array_equal(*sounds)


def test_what_is_no_run_of_whole_pages_is_refused() -> None:
    payload = opus()
    for broken in (payload[:-1], payload[:10], b"x" + payload, payload + b"rest"):
        with pytest.raises(ValueError, match="Ogg page"):
            with_fixed_serial(broken)
