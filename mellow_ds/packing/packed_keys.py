"""Keys of clips and ids of questions in half the bytes: the hash itself, in place of its hexadecimal digits.

They are kept as numpy's `S16`, which sorts and compares all 16 bytes, though it does not show zeros at the end.
"""

import numpy as np

from mellow_ds.shard_format import KEY_LENGTH

PACKED_BYTES = KEY_LENGTH // 2
PACKED_DTYPE = np.dtype(f"S{PACKED_BYTES}")


def pack_keys(keys: np.ndarray) -> np.ndarray:
    """[n] S16 of the keys [n] (S32, hexadecimal), in the same order."""
    return np.frombuffer(bytes.fromhex(np.ascontiguousarray(keys).tobytes().decode("ascii")), dtype=PACKED_DTYPE)


def unpack_key(key: bytes) -> str:
    """The hexadecimal digits of an entry of such an array."""
    return bytes(key).ljust(PACKED_BYTES, b"\0").hex()
