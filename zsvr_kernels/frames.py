"""Frame tables: which frames each query frame attends to. int32 ``[T, R]``, -1 = absent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zsvr_kernels.validation import check_int

BORDERS = ("replicate", "drop", "reflect")


class Relative(NamedTuple):
    """The frame ``offset`` away from the query frame."""

    offset: int


class Absolute(NamedTuple):
    """Frame ``frame`` of the clip; negative counts from the end."""

    frame: int


def relative(offset: int) -> Relative:
    """Return a table item for the frame ``offset`` away from the query frame; see `index_list`."""
    return Relative(check_int("offset", offset))


def absolute(frame: int) -> Absolute:
    """Return a table item for one frame of the clip, negative from its end; see `index_list`."""
    return Absolute(check_int("frame", frame))


def _entry(item: Relative | Absolute, i: int, numbers: list[int], where: dict[int, int], border: str) -> int:
    """Return an entry of row i; ``numbers`` are the frames' absolute numbers, ``where`` is their inverse."""
    mirrored = None
    if isinstance(item, Relative):
        wanted, mirrored = numbers[i] + item.offset, numbers[i] - item.offset
    else:
        wanted = item.frame if item.frame >= 0 else len(numbers) + item.frame
    if wanted in where:
        return where[wanted]
    if border == "drop":
        return -1
    return where.get(mirrored, i) if border == "reflect" and mirrored is not None else i


def _finish(row: list[int], i: int, dedupe: bool) -> list[int]:
    if all(j < 0 for j in row):
        row = [i] + [-1] * (len(row) - 1)
    present = {j for j in row if j >= 0}
    if dedupe or len(present) == 1:
        seen: set[int] = set()
        row = [-1 if j in seen or seen.add(j) else j for j in row]  # type: ignore[func-returns-value]
    return row


def index_list(
    T: int,
    items: Iterable[Relative | Absolute],
    *,
    include_self: bool = False,
    border: str = "replicate",
    dedupe: bool = False,
    ids: Sequence[int] | None = None,
) -> Tensor:
    """Return the frame table whose row i holds the given items, in their order.

    A row whose entries are all one frame keeps the first and drops the others: the output of attention is the
    same, and with ``T = 1`` every table is plain spatial self-attention.

    Args:
        T: frames of the clip, at least 1.
        items: `relative` and `absolute` items, at least one.
        include_self: append the query frame itself.
        border: what an item outside the clip becomes. ``"replicate"``: the query frame; ``"drop"``: absent
            (a row left empty becomes the query frame); ``"reflect"``: for a relative item the neighbour on the
            other side if it exists, else the query frame.
        dedupe: repeats within a row beyond the first become absent. By default they count twice.
        ids: absolute numbers of the T frames, rising, where they are a window of a longer clip: items then mean
            absolute frames, and a frame outside the window is missing. None: 0..T-1.

    Returns:
        int32 ``[T, R]``, -1 where absent.

    Raises:
        ValueError: ``T < 1``, no items, an unknown border rule, ids that are not T rising numbers, an absolute item
            from the end in a window.
    """
    T = check_int("T", T, 1)
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    listed = list(items)
    if include_self:
        listed.append(Relative(0))
    if not listed:
        raise ValueError("a frame table needs at least one item")
    for item in listed:
        if not isinstance(item, (Relative, Absolute)):
            raise TypeError(f"items must come from relative() or absolute(), got {item!r}")
    numbers = list(range(T)) if ids is None else [check_int("ids", n, 0) for n in ids]
    if len(numbers) != T or any(a >= b for a, b in itertools.pairwise(numbers)):
        raise ValueError(f"ids must be T = {T} rising frame numbers, got {numbers}")
    if ids is not None and any(isinstance(item, Absolute) and item.frame < 0 for item in listed):
        raise ValueError("a window does not know the clip's end: name its frames from the start")
    where = {number: j for j, number in enumerate(numbers)}
    rows = [_finish([_entry(item, i, numbers, where, border) for item in listed], i, dedupe) for i in range(T)]
    return torch.tensor(rows, dtype=torch.int32)


def neighbors(
    T: int,
    offsets: Sequence[int] = (-1, 1),
    include_self: bool = False,
    border: str = "replicate",
    *,
    dedupe: bool = False,
) -> Tensor:
    """Return the table of neighbouring frames, int32 ``[T, len(offsets) + include_self]``.

    Arguments and errors are those of `index_list`, with one `relative` item per offset.

    Example:
        >>> zsvr_kernels.neighbors(4).tolist()
        [[0, 1], [0, 2], [1, 3], [2, 3]]
    """
    items = [relative(o) for o in offsets]
    return index_list(T, items, include_self=include_self, border=border, dedupe=dedupe)


def previous(T: int) -> Tensor:
    """Return the table ``[[i - 1]]``, int32 ``[T, 1]``; frame 0 reads itself."""
    return neighbors(T, (-1,))


def first_and_previous(T: int) -> Tensor:
    """Return the table ``[[0, i - 1]]``, int32 ``[T, 2]``, the sparse-causal pattern of Tune-A-Video."""
    return index_list(T, [absolute(0), relative(-1)])


def anchors(T: int, frames: Sequence[int], include_self: bool = False, *, dedupe: bool = False) -> Tensor:
    """Return the table in which every frame reads the listed frames (negative: from the end).

    Raises:
        ValueError: ``T < 1``, no frames, a frame outside the clip (`index_list` would apply its border rule).
    """
    T = check_int("T", T, 1)
    items = [absolute(f) for f in frames]
    for item in items:
        if not -T <= item.frame < T:
            raise ValueError(f"frame {item.frame} is outside a clip of {T} frames")
    return index_list(T, items, include_self=include_self, dedupe=dedupe)


def all_frames(T: int) -> Tensor:
    """Return the dense table: every frame reads all frames, int32 ``[T, T]``."""
    return index_list(T, [absolute(f) for f in range(check_int("T", T, 1))])
