"""Codes of a few bits as bytes: at their bits, or compressed without loss.

Deep Compression (Han et al., ICLR 2016, arXiv:1510.00149) stores quantized weights in Huffman's code. So does this, by
zlib of the standard library, on bytes of as many codes as fit into one (ours).
"""

from __future__ import annotations

import math
import zlib

import numpy as np


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Unsigned codes below 2^bits, one after the other, the lowest bit first."""
    each = (codes.reshape(-1, 1).astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(each.ravel(), bitorder='little').tobytes()


def unpack_codes(data: bytes, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`pack_codes`, uint8.

    Raises:
        ValueError: the data have another length.
    """
    raw = np.frombuffer(data, np.uint8)
    if len(raw) != math.ceil(count * bits / 8):
        raise ValueError(f'{len(raw)} bytes for {count} codes of {bits} bits')
    each = np.unpackbits(raw, count=count * bits, bitorder='little').reshape(count, bits)
    return (each << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


def compress_codes(codes: np.ndarray, bits: int) -> bytes:
    """Unsigned codes below 2^bits, 8 // bits in each byte, the first one lowest, as a raw deflate stream."""
    each = np.zeros((_bytes_of(codes.size, bits), 8 // bits), np.uint8)
    each.ravel()[: codes.size] = codes.ravel()
    joined = (each << (bits * np.arange(8 // bits, dtype=np.uint8))).sum(1, dtype=np.uint8)
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)  # what weights repeat is by chance
    return stream.compress(joined.tobytes()) + stream.flush()


def decompress_codes(data: bytes, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`compress_codes`, uint8; never more than `count` codes are made.

    Raises:
        ValueError: the data are no such stream, or not of this many codes.
    """
    stream, length = zlib.decompressobj(-15), _bytes_of(count, bits)
    if length > 8 * len(data):  # Huffman's code has at least one bit a byte; a crafted stream may have less
        raise ValueError(f'compressed codes are not {count}: {len(data)} bytes are too few')
    try:
        raw = stream.decompress(data, length + 1)
    except zlib.error as error:
        raise ValueError(f'compressed codes are damaged: {error}') from None
    if len(raw) != length or not stream.eof or stream.unused_data:
        raise ValueError(f'compressed codes are not {count}, or cut off, or followed by something')
    joined = np.frombuffer(raw, np.uint8)[:, None]
    each = (joined >> (bits * np.arange(8 // bits, dtype=np.uint8))) & ((1 << bits) - 1)
    return each.astype(np.uint8).ravel()[:count]


def _bytes_of(count: int, bits: int) -> int:
    return math.ceil(count / (8 // bits))


def entropy(codes: np.ndarray) -> float:
    """Bits that each code needs at least where none tells about another: -sum(p log2 p) over the values."""
    share = np.unique(codes, return_counts=True)[1] / max(codes.size, 1)
    return float(-(share * np.log2(share)).sum()) + 0.0
