"""Pictures and tables of the demo."""

from __future__ import annotations

import pathlib

import numpy as np
from torch import Tensor

from zsvr_kernels.demo.video import to_bytes

GAP, LABEL = 6, 22
COLUMN = 300  # narrower pictures are enlarged, so that labels fit


def _enlarged(picture: np.ndarray, factor: int) -> np.ndarray:
    return picture.repeat(factor, 0).repeat(factor, 1)


def _mark(canvas: np.ndarray, y: int, x: int, width: int) -> None:
    """Draw a dashed line, yellow and black so that it is seen on any picture."""
    for begin in range(0, width, 12):
        canvas[y : y + 2, x + begin : x + min(begin + 6, width)] = (255, 230, 0)
        canvas[y : y + 2, x + min(begin + 6, width) : x + min(begin + 12, width)] = 0


def contact_sheet(path: pathlib.Path, columns: dict[str, Tensor], notes: dict[str, str], row: int) -> None:
    """Write a PNG: one column per clip with its middle frame, an enlarged part, and the x-time slice of ``row``.

    Args:
        path: where to write.
        columns: title -> clip ``[T, 3, H, W]``.
        notes: title -> second line of the label.
        row: pixel row of the x-time slice; flicker shows there as horizontal stripes.
    """
    from PIL import Image, ImageDraw, ImageFont

    clips = {title: to_bytes(clip) for title, clip in columns.items()}
    T, H, W, _ = next(iter(clips.values())).shape
    factor = -(-COLUMN // W)
    repeat = max(1, round(6 * 16 / T)) * max(1, factor // 2)  # every frame is this many rows of the slice
    middle, zoom = T // 2, 3 * factor
    part_h, part_w = max(1, H // 3), -(-W // 3)
    top, left = min(max(row - part_h // 2, 0), H - part_h), (W - part_w) // 2
    width, shown = W * factor, H * factor
    rows = [2 * LABEL, shown, LABEL, part_h * zoom, LABEL, T * repeat]
    canvas = np.full((sum(rows) + GAP, len(clips) * (width + GAP) + GAP, 3), 255, np.uint8)
    for n, clip in enumerate(clips.values()):
        x = GAP + n * (width + GAP)
        y = rows[0]
        canvas[y : y + shown, x : x + width] = _enlarged(clip[middle], factor)
        _mark(canvas, y + row * factor, x, width)
        y += shown + LABEL
        detail = clip[middle, top : top + part_h, left : left + part_w]
        canvas[y : y + part_h * zoom, x : x + width] = _enlarged(detail, zoom)[:, :width]
        y += part_h * zoom + LABEL
        canvas[y : y + T * repeat, x : x + width] = clip[:, row].repeat(repeat, 0).repeat(factor, 1)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    for n, title in enumerate(clips):
        x = GAP + n * (width + GAP)
        draw.text((x, 3), title, fill=(0, 0, 0), font=font)
        draw.text((x, LABEL), notes.get(title, ""), fill=(70, 70, 70), font=small)
        draw.text((x, rows[0] + shown + 3), "detail", fill=(110, 110, 110), font=small)
        text = "the dashed line over time, downward"
        draw.text((x, sum(rows[:4]) + 3), text, fill=(110, 110, 110), font=small)
    image.save(path, optimize=True)


def side_by_side(columns: dict[str, Tensor]) -> np.ndarray:
    """Return clips beside each other as uint8 ``[T, H', W', 3]`` with even sides, small ones enlarged."""
    clips = [to_bytes(clip) for clip in columns.values()]
    factor = max(1, COLUMN // clips[0].shape[2])
    joined = np.concatenate(clips, axis=2).repeat(factor, 1).repeat(factor, 2)
    height, width = joined.shape[1] // 2 * 2, joined.shape[2] // 2 * 2
    return np.ascontiguousarray(joined[:, :height, :width])


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    lines = [header, *rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]

    def text(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if n == 0 else ":") for n, w in enumerate(widths)) + "|"
    return "\n".join([text(header), rule, *map(text, rows)])
