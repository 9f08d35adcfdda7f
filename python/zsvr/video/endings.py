"""Whether a file is whole, where decoders would fill up what is missing, or end early, without a word."""

from __future__ import annotations

import pathlib

JPEG = b"\xff\xd8\xff"
GIF = (b"GIF87a", b"GIF89a")
MATROSKA = b"\x1a\x45\xdf\xa3"
SEGMENT = b"\x18\x53\x80\x67"


def jpeg_ends_early(data: bytes) -> bool:
    """Return whether the first picture of a JPEG file lacks its end marker (ITU-T T.81, annex B), marker by marker."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == 0xD9:
            return False
        if marker == 0xFF:  # filling
            at += 1
        elif marker == 0 or 0xD0 <= marker <= 0xD7:  # inside of coded data
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def whole_gif_frames(data: bytes) -> int | None:
    """Return how many frames are whole in a GIF file that ends early, None if it does not (CompuServe, GIF89a)."""

    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    frames = 0
    try:
        at = 13 + table(data[10])
        while (kind := data[at]) != 0x3B:
            if kind not in (0x21, 0x2C):
                return None  # something else follows, which decoders skip
            at += 2 if kind == 0x21 else 11 + table(data[at + 9])
            while data[at]:
                at += 1 + data[at]
            at += 1
            frames += kind == 0x2C
    except IndexError:
        return frames
    return None


def matroska_ends_early(path: pathlib.Path) -> bool:
    """Return whether a Matroska or WebM file is shorter than its segment says (RFC 8794, RFC 9559)."""
    with open(path, "rb") as file:
        head = file.read(4096)
    _, at, size = _size(head, 4)
    if head[at + size : at + size + 4] != SEGMENT:
        return False
    is_known, at, size = _size(head, at + size + 4)
    return is_known and at + size > path.stat().st_size


def _size(data: bytes, at: int) -> tuple[bool, int, int]:
    """Return whether the size of an EBML element, which stands at ``at``, is known, where it ends, and the size."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    most = (1 << 7 * length) - 1
    size = int.from_bytes(data[at : at + length], "big") & most
    return bool(first) and size != most, at + length, size
