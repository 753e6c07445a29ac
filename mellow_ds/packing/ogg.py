"""Give an Ogg file the same bytes whenever it is written: libsndfile draws the serial number of the stream at random.

A page (RFC 3533) is 27 bytes of header (byte 14: serial number, 22: checksum, 26: number of segments), the lengths of
its segments, and the segments. Its checksum is a CRC-32 with the polynomial 0x04c11db7, highest bit first, from 0,
without a final inversion, over the whole page with the checksum's place zero.
"""

import zlib

_HEADER_BYTES = 27
_SERIAL = b"mell"  # a file holds one stream, so any number will do
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def with_fixed_serial(payload: bytes) -> bytes:
    """An Ogg file of one stream with a fixed serial number; raises `ValueError` where it is not a run of Ogg pages."""
    pages = bytearray(payload)
    start = 0
    while start < len(pages):
        segments = start + _HEADER_BYTES
        if pages[start : start + 4] != b"OggS" or segments > len(pages):
            raise ValueError(f"no Ogg page at byte {start}")
        lengths = pages[segments : segments + pages[segments - 1]]
        end = segments + len(lengths) + sum(lengths)
        if end > len(pages) or len(lengths) < pages[segments - 1]:
            raise ValueError(f"the Ogg page at byte {start} is not whole")
        pages[start + 14 : start + 18] = _SERIAL
        pages[start + 22 : start + 26] = bytes(4)
        pages[start + 22 : start + 26] = ogg_crc(bytes(pages[start:end])).to_bytes(4, "little")
        start = end
    return bytes(pages)


def ogg_crc(page: bytes) -> int:
    """Ogg's CRC-32 of `page`.

    zlib has the same polynomial, but reads bits lowest first and inverts before and after: bits of each byte and of the
    result are turned round, inversions undone. That is some 100 times as fast as a loop over the bytes.
    """
    turned = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(turned.to_bytes(4, "little").translate(_REVERSED_BITS), "big")
