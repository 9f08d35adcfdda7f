"""The public functions: check, choose a backend, hand over."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels import backends, validation
from zsvr_kernels.ops.correspondence_search import registration  # noqa: F401  (defines the torch.ops)
from zsvr_kernels.ops.correspondence_search.reference import correspondence_search_reference, link_score_reference
from zsvr_kernels.sampling import Grid


def correspondence_search(
    f_src: Tensor,
    f_dst: Tensor,
    centre: Tensor,
    *,
    grid: Grid,
    radius: int = 2,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find, for every source token, the most similar token in a window of the destination frame.

    The window of token p holds the sites of the grid at most ``radius`` away from ``centre[p]`` in x and in y; the
    centre is clamped into the grid first. Similarity is the cosine ``a.b / (max(|a|, 1e-6) max(|b|, 1e-6))`` in
    float32. The largest wins, of equals the lowest site.

    Args:
        f_src, f_dst: features of N frame pairs, ``[N, P, C]`` float32, bfloat16 or float16 (float64 on
            ``reference``), channels dense.
        centre: int32 ``[N, P, 2]``, (x, y) in token-grid pixels.
        grid: ``(Hg, Wg)`` with ``Hg * Wg = P``.
        radius: r >= 0; the window has ``(2r+1)^2`` sites.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; see `explain`.

    Returns:
        ``site`` int32 ``[N, P]`` and its ``score`` float32 ``[N, P]``. No gradient flows through. Where no candidate's
        similarity is a number, the window's lowest site and -inf.

    Raises:
        TypeError, ValueError: tensors that do not fit each other or the grid, a negative radius.
        RuntimeError: the requested backend cannot run this call.

    Example:
        >>> f = torch.randn(2, 64, 32)
        >>> site, score = zsvr_kernels.correspondence_search(
        ...     f[:1], f[1:], torch.zeros(1, 64, 2, dtype=torch.int32), grid=(8, 8), radius=7)
        >>> site.shape
        torch.Size([1, 64])
    """
    grid = validation.check_features(f_src, f_dst, grid)
    validation.check_centre(centre, f_src)
    radius = validation.check_radius(radius)
    call = backends.Call("correspondence_search", f_src.device.type, f_src.dtype, None)
    backend = backends.choose(backend, call)
    f_src, f_dst = f_src.detach(), f_dst.detach()
    if backend == "reference":
        return correspondence_search_reference(f_src, f_dst, centre, grid, radius)
    return torch.ops.zsvr.correspondence_search(f_src, f_dst, centre, *grid, radius, backend)


def link_score(
    f_src: Tensor,
    f_dst: Tensor,
    positions: Tensor,
    *,
    grid: Grid,
    backend: str = "auto",
) -> Tensor:
    """Score links: the cosine between each source token and the destination sampled bilinearly where it points.

    Args:
        f_src, f_dst: as in `correspondence_search`.
        positions: float32 ``[N, P, 2]``, (x, y) in token-grid pixels, clamped to the border.
        grid: ``(Hg, Wg)`` with ``Hg * Wg = P``.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; see `explain`.

    Returns:
        float32 ``[N, P]``. No gradient flows through.

    Raises:
        TypeError, ValueError: tensors that do not fit each other or the grid.
        RuntimeError: the requested backend cannot run this call.

    Example:
        >>> f, where = torch.randn(2, 64, 32), torch.zeros(1, 64, 2)
        >>> zsvr_kernels.link_score(f[:1], f[1:], where, grid=(8, 8)).shape
        torch.Size([1, 64])
    """
    grid = validation.check_features(f_src, f_dst, grid)
    validation.check_link_positions(positions, f_src)
    call = backends.Call("link_score", f_src.device.type, f_src.dtype, None)
    backend = backends.choose(backend, call)
    f_src, f_dst, positions = f_src.detach(), f_dst.detach(), positions.detach()
    if backend == "reference":
        return link_score_reference(f_src, f_dst, positions, grid)
    return torch.ops.zsvr.link_score(f_src, f_dst, positions, *grid, backend)
