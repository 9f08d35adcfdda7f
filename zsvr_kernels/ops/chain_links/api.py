"""The public function: checks, chooses a backend, hands over."""

from __future__ import annotations

import torch

from zsvr_kernels import backends, validation
from zsvr_kernels.links import LINK_RULES, ROUNDINGS, Links
from zsvr_kernels.ops.chain_links import registration  # defines torch.ops.zsvr.chain_links
from zsvr_kernels.ops.chain_links.reference import chain_links_reference, slot_frames
from zsvr_kernels.trajectories import Trajectories


def chain_links(
    links: Links,
    *,
    window: int | None = None,
    rounding: str = "bilinear",
    link_rule: str = "nearest",
    backend: str = "auto",
) -> Trajectories:
    """Chain adjacent-frame links into the trajectory of every token of every frame.

    From its own site a token moves by the bilinearly sampled displacement field, frame by frame, forward and
    backward. It is lost for good at the first link that is not valid, or when it leaves the grid by more than
    half a pixel; lost slots hold the own site and are not valid. The own slot is the own site, always valid.

    Args:
        links: from `Links.from_flow` or `Links.from_positions`, for T frames.
        window: None: every frame has a slot, ``L = T``; 0 <= w <= 65535: the 2w+1 frames around the own one; those
            outside the clip are absent.
        rounding: ``"nearest"`` rounds every link to a site first.
        link_rule: the link taken from a sub-pixel position is valid if it is valid at the ``"nearest"`` site, or
            at all ``"corners"`` of non-zero weight.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; see `explain`.

    Returns:
        Trajectories, 9 bytes for each of ``B*T*L*P`` slots. No gradient flows through.

    Raises:
        TypeError, ValueError: not links, links whose tensors do not fit each other or the grid, a window out of range,
            unknown options.

    Example:
        >>> flow = torch.zeros(1, 7, 2, 96, 128)
        >>> links = zsvr_kernels.Links.from_flow(flow, flow, grid=(12, 16))
        >>> zsvr_kernels.chain_links(links, window=2).positions.shape
        torch.Size([1, 8, 5, 192, 2])
    """
    if not isinstance(links, Links):
        raise TypeError(f"links must be zsvr_kernels.Links, got {type(links).__name__}")
    fields = (links.forward, links.backward, links.valid_forward, links.valid_backward)
    grid = validation.check_links(*fields, links.grid)
    window = validation.check_window(window)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if link_rule not in LINK_RULES:
        raise ValueError(f"link_rule must be one of {', '.join(LINK_RULES)}, got {link_rule!r}")
    call = backends.Call("chain_links", links.forward.device.type, links.forward.dtype, None)
    backend = backends.choose(backend, call)
    nearest, corners = rounding == "nearest", link_rule == "corners"
    if backend == "reference":
        positions, valid = chain_links_reference(*fields, grid, window, nearest, corners)
    elif backend == "triton" and not torch.compiler.is_compiling():
        positions, valid, *records = registration.chain_with_records(*fields, grid, window, nearest, corners)
        trajectories = Trajectories(positions, valid, slot_frames(links.frames, window, positions.device), grid)
        trajectories.hold_records(*records)
        return trajectories
    else:
        positions, valid = torch.ops.zsvr.chain_links(*fields, *grid, window, nearest, corners, backend)
    return Trajectories(positions, valid, slot_frames(links.frames, window, positions.device), grid)
