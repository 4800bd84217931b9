"""
Read width and height of ordinary PNG and JPEG files from their first bytes, several times faster than opening them.

All other files (other formats, colour profiles, EXIF, a long or odd header) are left to Pillow: this module only
recognises files that are sure to pass Pillow's header checks.
"""

import zlib


HEAD = 1024  # bytes that are looked at: a JPEG without EXIF has its size and its tables in them

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

PNG_MODES = {  # bits, colour type
    *((bits, 0) for bits in (1, 2, 4, 8, 16)),
    *((bits, 3) for bits in (1, 2, 4, 8)),
    *((bits, kind) for bits in (8, 16) for kind in (2, 4, 6)),
}

PNG_CHUNKS = {b"pHYs": 9, b"gAMA": 4, b"sRGB": 1, b"cHRM": 32}  # may stand before the pixels: their lengths

JPEG_START = b"\xff\xd8\xff"

JFIF, QUANTISATION, SCAN = 0xE0, 0xDB, 0xDA

FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive

HUFFMAN, RESTART = 0xC4, 0xDD  # Pillow leaves these segments to the decoder


def ordinary_size(head: bytes) -> tuple[int, int] | None:
    """
    Width and height of a picture, if it is an ordinary one.

    Args:
        head (`bytes`):
            The first [`HEAD`] bytes of the file, or all of them.

    Examples:
    ```python
    >>> import io
    >>> from PIL import Image
    >>> from trl_mprm.data.image_header import ordinary_size
    >>> Image.new("RGB", (3, 2)).save(file := io.BytesIO(), "JPEG")
    >>> ordinary_size(file.getvalue()), ordinary_size(file.getvalue()[:100]), ordinary_size(b"GIF89a")
    ((3, 2), None, None)

    ```
    """
    if head.startswith(PNG_START):
        return _png_size(head)
    return _jpeg_size(head) if head.startswith(JPEG_START) else None


def _png_size(head: bytes) -> tuple[int, int] | None:
    if len(head) < 33 or (head[24], head[25]) not in PNG_MODES or head[27] != 0 or not _checksum_fits(head, 12, 29):
        return None
    start = 33
    while (kind := head[start + 4 : start + 8]) != b"IDAT":
        end = start + 8 + PNG_CHUNKS.get(kind, 0)
        if kind not in PNG_CHUNKS or int.from_bytes(head[start : start + 4]) != PNG_CHUNKS[kind]:
            return None
        if not _checksum_fits(head, start + 4, end):
            return None
        start = end + 4
    width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    return (width, height) if width and height else None


def _checksum_fits(head: bytes, start: int, end: int) -> bool:
    return len(head) >= end + 4 and zlib.crc32(head[start:end]) == int.from_bytes(head[end : end + 4])


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    start, size = 2, None
    while len(head) >= start + 4 and head[start] == 0xFF:
        marker, length = head[start + 1], int.from_bytes(head[start + 2 : start + 4])
        segment = head[start + 4 : start + 2 + length]
        if length < 2 or len(segment) != length - 2:
            return None
        if marker == SCAN:
            return size
        if marker == QUANTISATION:
            if len(segment) % 65 or any(first > 15 for first in segment[::65]):
                return None
        elif marker in FRAMES:
            if len(segment) < 6 or segment[0] != 8 or segment[5] not in (1, 3) or len(segment) != 6 + 3 * segment[5]:
                return None
            size = int.from_bytes(segment[3:5]), int.from_bytes(segment[1:3])
            if not all(size):
                return None
        elif marker not in (HUFFMAN, RESTART) and not (marker == JFIF and segment[:5] == b"JFIF\0" and length == 16):
            return None
        start += 2 + length
    return None
