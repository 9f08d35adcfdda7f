"""Between decoded frames and RGB: matrix, range, bit depth, alpha, rotation.

A video's Y'CbCr becomes R'G'B' with the matrix and range it is tagged with. Untagged: BT.709 from 720 lines on and
BT.601 below, studio range, as players assume; pictures (JPEG): full range. Transfer curves and primaries are left as
they are, so HDR video keeps its curve.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
HD_LINES = 720

# AVColorSpace -> SWS_CS, as FFmpeg numbers them; 2 is "unspecified".
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
NAMES = {1: "bt709", 4: "fcc", 5: "bt601", 7: "smpte240m", 9: "bt2020"}
WEIGHTS = {  # matrix -> weights of red and blue in luma
    1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)
}  # fmt: skip
BT601, BT709 = 5, 1
STUDIO, FULL = 1, 2
EXIF = re.compile(rb"(?:\A|Exif\0\0|eXIf|EXIF....)(II\*\0|MM\0\*)", re.DOTALL)  # of TIFF, JPEG, PNG, WebP
MIRRORED = {(-1, 0, 0, 1): 2, (1, 0, 0, -1): 4, (0, 1, 1, 0): 5, (0, -1, -1, 0): 7}  # signs of a matrix -> orientation


def matrix(tag: int, height: int) -> int:
    """Return the matrix (SWS_CS number) for a frame's colour space tag, by height where there is none."""
    return MATRICES.get(tag, BT709 if height >= HD_LINES else BT601)


def depth(frame_format: Any) -> int:
    """Return the bits per channel of an av.VideoFormat (pal8: 8)."""
    return max((c.bits for c in frame_format.components), default=8)


def has_alpha(frame_format: Any) -> bool:
    """Return whether an av.VideoFormat has an alpha channel (palettes are asked when decoded)."""
    return any(c.is_alpha for c in frame_format.components)


def is_luma_chroma(frame_format: Any) -> bool:
    """Return whether an av.VideoFormat holds Y'CbCr."""
    return not frame_format.is_rgb and len(frame_format.components) >= 3 and not frame_format.name.startswith("pal")


def _flags() -> Any:
    from av.video.reformatter import Interpolation

    return Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def _scale(bits: int, is_full: bool) -> tuple[float, float, float, float]:
    """Return luma's zero and span, chroma's zero and span, in levels."""
    unit, top = 2 ** (bits - 8), 2**bits - 1
    return (0, top, 128 * unit, top) if is_full else (16 * unit, 219 * unit, 128 * unit, 224 * unit)


def _full_chroma(bits: int) -> str:
    return "yuv444p" if bits <= 8 else f"yuv444p{bits}le"


def _plane(plane: Any, bits: int) -> np.ndarray:
    """Return a plane's levels ``[H, W]`` as float32."""
    size = 1 if bits <= 8 else 2
    rows = np.frombuffer(plane, f"<u{size}").reshape(-1, plane.line_size // size)
    return rows[: plane.height, : plane.width].astype(np.float32)


def _from_luma_chroma(frame: Any) -> np.ndarray:
    """Return ``[H, W, 3]``: chroma enlarged at the frame's own depth, then matrix and range in float."""
    bits = depth(frame.format)
    is_full = frame.color_range == FULL or frame.format.name.startswith("yuvj")
    which = matrix(frame.colorspace, frame.height)
    same = FULL if is_full else STUDIO
    if frame.format.name not in (_full_chroma(bits), "yuvj444p"):
        frame = frame.reformat(
            format=_full_chroma(bits), interpolation=_flags(), src_colorspace=which, dst_colorspace=which,
            src_color_range=same, dst_color_range=same,
        )  # fmt: skip
    zero, span, neutral, width = _scale(bits, is_full)
    y, cb, cr = (_plane(plane, bits) for plane in frame.planes[:3])
    y, cb, cr = (y - zero) / span, (cb - neutral) / width, (cr - neutral) / width
    kr, kb = WEIGHTS[which]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack((red, green, blue), -1), 0, 1).astype(np.float32)


def to_luma_chroma(picture: np.ndarray, bits: int) -> Any:
    """Return RGB ``[3, H, W]`` in [0, 1], even sides, as a 4:2:0 av.VideoFrame: BT.709, studio range."""
    import av

    red, green, blue = np.clip(picture, 0, 1).astype(np.float64)
    kr, kb = WEIGHTS[BT709]
    y = kr * red + (1 - kr - kb) * green + kb * blue
    zero, span, neutral, width = _scale(bits, False)
    planes = (
        zero + span * y, neutral + width * (blue - y) / (2 * (1 - kb)), neutral + width * (red - y) / (2 * (1 - kr)),
    )  # fmt: skip
    frame = av.VideoFrame(picture.shape[2], picture.shape[1], _full_chroma(bits))
    kind = "<u1" if bits <= 8 else "<u2"
    for plane, values in zip(frame.planes, planes, strict=True):
        padded = np.zeros((plane.height, plane.line_size // int(kind[2])), kind)
        padded[:, : plane.width] = np.floor(values + 0.5)
        plane.update(padded.tobytes())
    return frame.reformat(
        format="yuv420p" if bits <= 8 else f"yuv420p{bits}le", interpolation=_flags(), src_colorspace=BT709,
        dst_colorspace=BT709, src_color_range=STUDIO, dst_color_range=STUDIO,
    )  # fmt: skip


def exif_mirroring(data: bytes) -> int:
    """Return the Exif orientation of a picture file if it is a mirrored one (2, 4, 5, 7), else 0.

    FFmpeg keeps of such an orientation a turn alone, which shows another picture.
    """
    found = EXIF.search(data)
    if not found:
        return 0
    tiff = data[found.start(1) :]
    order = "<" if tiff.startswith(b"I") else ">"
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        entries = [struct.unpack_from(f"{order}HHIH", tiff, at + 2 + 12 * n) for n in range(count)]
    except struct.error:
        return 0
    return next((value for tag, _, _, value in entries if tag == 0x112 and value in MIRRORED.values()), 0)


def _mirroring(frame: Any) -> int:
    """Return what `exif_mirroring` does, of a video's display matrix."""
    try:
        matrix = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)
    except (KeyError, ValueError):  # none; or beside side data that PyAV does not know
        return 0
    return MIRRORED.get(tuple(np.sign(matrix[[0, 1, 3, 4]]).tolist()), 0)


def to_rgb(frame: Any, mirroring: int = 0) -> np.ndarray:
    """Return a decoded av.VideoFrame as RGB float32 ``[3, H, W]`` in [0, 1], upright (``mirroring``: `exif_mirroring`).

    RGB and grey of any depth are exact (``level / (2^bits - 1)``); Y'CbCr is computed in float and clipped.
    """
    bits, name = depth(frame.format), frame.format.name
    if name.startswith("gray") and not name.startswith("grayf") and not name.endswith("be"):
        luma = frame.to_ndarray().astype(np.float32)
        if frame.color_range == STUDIO:
            unit = 2 ** (bits - 8)
            luma = np.clip((luma - 16 * unit) / np.float32(219 * unit), 0, 1)
        else:
            luma /= np.float32(2**bits - 1)
        picture = np.repeat(luma[..., None], 3, axis=-1)
    elif name.startswith("gbrp") and (name == "gbrp" or (name.endswith("le") and "f" not in name)):
        picture = frame.to_ndarray().astype(np.float32) / np.float32(2**bits - 1)
    elif is_luma_chroma(frame.format):
        picture = _from_luma_chroma(frame)
    else:
        rgb = frame.reformat(format="rgb48le" if bits > 8 else "rgb24")
        picture = rgb.to_ndarray().astype(np.float32) / np.float32(65535 if bits > 8 else 255)
    mirroring = mirroring or _mirroring(frame)
    if mirroring:
        turned = picture.swapaxes(0, 1)
        picture = {2: picture[:, ::-1], 4: picture[::-1], 5: turned, 7: turned[::-1, ::-1]}[mirroring]
    else:
        picture = np.rot90(picture, round(frame.rotation / 90) if frame.rotation else 0)
    return np.ascontiguousarray(np.moveaxis(picture, -1, 0))


def alpha_is_used(frame: Any) -> bool:
    """Return whether any pixel of a frame with alpha is not opaque."""
    if not has_alpha(frame.format):
        return False
    alpha = frame.reformat(format="rgba").to_ndarray()[..., 3]
    return bool((alpha < 255).any())


def to_integers(picture: np.ndarray, bits: int) -> np.ndarray:
    """Return float32 ``[3, H, W]`` as integers ``[H, W, 3]`` of ``bits``: ``floor(u (2^bits - 1) + 0.5)``, clipped."""
    levels = np.floor(np.clip(picture, 0, 1).astype(np.float32) * np.float32(2**bits - 1) + np.float32(0.5))
    return np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8 if bits <= 8 else np.uint16), 0, -1))
