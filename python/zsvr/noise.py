"""Random fields as pure functions of a key, and how the frames of a clip share them.

No field depends on call order, batch, window or tile: it is drawn on the full canvas from a counter-based generator
(Salmon et al., SC 2011) whose key is a hash of seed, kind, step, frame and visit. Windows agree on it because frames
are counted in the whole clip; tiles agree because they are cut out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from zsvr_kernels.links import inside_pixels, pool_occlusion, resize_flow
from zsvr_kernels.sampling import nearest_site, sites

KINDS = {"initial": 0, "step": 1, "measurement": 2, "travel": 3, "light_gain": 4, "light_offset": 5, "mask": 6}
SHARINGS = ("share", "warp_blend", "static_mask", "rho", "none")
FILLS = ("shared", "fresh")
SHARED = -1  # the frame index of a field that all frames share

_WORD = (1 << 64) - 1


def mix(v: int) -> int:
    """Return the 64-bit hash of a 64-bit integer (the finalizer of SplitMix64, Steele et al., OOPSLA 2014)."""
    v = (v + 0x9E3779B97F4A7C15) & _WORD
    v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) & _WORD
    return v ^ (v >> 31)


def key(seed: int, kind: str, step: int = -1, frame: int = SHARED, visit: int = 0) -> int:
    """Return the 64-bit key of a field.

    Args:
        seed: 0..2^63-1.
        kind: one of `KINDS`.
        step: training step, at least 0; -1 where the kind has no step.
        frame: index in the whole clip; -1: shared by all frames.
        visit: how often that step ran before (time travel).

    Raises:
        ValueError: an unknown kind, or a number out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be within 0..2^63-1, got {seed}")
    if min(step, frame) < -1 or visit < 0:
        raise ValueError(f"step and frame must be at least -1, visit at least 0, got {step}, {frame}, {visit}")
    h = mix(seed)
    for v in (KINDS[kind], step + 1, frame + 1, visit):
        h = mix(h ^ v)
    return h


def _generator(key_of_field: int) -> numpy.random.Generator:
    return numpy.random.Generator(numpy.random.Philox(key=key_of_field))


def normal(
    seed: int, kind: str, shape: Sequence[int], *, step: int = -1, frame: int = SHARED, visit: int = 0
) -> Tensor:
    """Return the standard normal field of a key: float32, on the CPU. Arguments as in `key`."""
    drawn = _generator(key(seed, kind, step, frame, visit)).standard_normal(tuple(shape), dtype=numpy.float32)
    return torch.from_numpy(drawn)


def uniform(
    seed: int, kind: str, shape: Sequence[int], *, step: int = -1, frame: int = SHARED, visit: int = 0
) -> Tensor:
    """Return the field of a key, uniform in [0, 1): float32, on the CPU. Arguments as in `key`."""
    drawn = _generator(key(seed, kind, step, frame, visit)).random(tuple(shape), dtype=numpy.float32)
    return torch.from_numpy(drawn)


def measurement(seed: int, frames: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return measurement noise of standard deviation 1, ``[len(frames), *shape]``; never shared between frames."""
    return torch.stack([normal(seed, "measurement", shape, frame=frame) for frame in frames])


def reliable(flow: Tensor, occluded: Tensor) -> tuple[Tensor, Tensor]:
    """Return flow without its non-finite values, and where it can be trusted.

    Args:
        flow: ``[T-1, 2, H, W]`` in pixels.
        occluded: bool ``[T-1, H, W]``.

    Returns:
        flow, and bool ``[T-1, H, W]``: neither occluded nor pointing outside the frame.
    """
    finite = torch.isfinite(flow).all(1)
    flow = flow.masked_fill(~finite[:, None], 0.0)
    return flow, finite & ~occluded & inside_pixels(flow)


def origins(flow_backward: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Follow every pixel back in time, frame by frame and to the nearest pixel, as far as the flow can be trusted.

    Args:
        flow_backward: ``[T-1, 2, H, W]``, entry i from frame i+1 to frame i.
        mask: bool ``[T-1, H, W]``, where that flow can be trusted.

    Returns:
        int32 ``[T, H*W]``, the pixel where the path began; int32 ``[T, H*W]``, the frame where it began.
    """
    count, _, H, W = flow_backward.shape
    own = torch.arange(H * W, dtype=torch.int32, device=flow_backward.device)
    at = sites((H, W), device=flow_backward.device)
    origin = torch.empty(count + 1, H * W, dtype=torch.int32, device=own.device)
    start = torch.empty_like(origin)
    origin[0], start[0] = own, 0
    for i in range(count):
        before = nearest_site(at + flow_backward[i].flatten(1).mT, (H, W))
        follows = mask[i].flatten()
        origin[i + 1] = torch.where(follows, origin[i][before], own)
        start[i + 1] = torch.where(follows, start[i][before], i + 1)
    return origin, start


def still(flow: Tensor, mask: Tensor, static_px: float, soft: bool) -> Tensor:
    """Return how much of the shared field each pixel takes, float32 ``[n, H, W]`` within 0..1.

    Args:
        flow: ``[n, 2, H, W]`` pixels.
        mask: bool ``[n, H, W]``.
        static_px: a pixel is static where the flow can be trusted and is shorter than this.
        soft: mean over the 5 x 5 pixels around (those inside the frame) instead of 0 or 1.
    """
    static = (mask & (torch.linalg.vector_norm(flow, dim=1) < static_px)).float()
    if not soft:
        return static
    return torch.nn.functional.avg_pool2d(static[:, None], 5, 1, 2, count_include_pad=False)[:, 0]


@dataclass(frozen=True)
class NoiseOptions:
    """How the frames of a clip share initial and step noise.

    Attributes:
        sharing: ``"share"``: all frames have the same field. ``"warp_blend"``: the shared field moves with the optical
            flow, and starts anew where that cannot be trusted. ``"static_mask"``: shared where nothing moves, the
            frame's own elsewhere. ``"rho"``: a mix of the shared and the own field. ``"none"``: the own field.
        fill: what ``"warp_blend"`` starts anew with: the ``"shared"`` field or a ``"fresh"`` one of that frame.
        static_px: motion below this many pixels counts as none.
        soft: ``"static_mask"`` blends over 5 x 5 pixels.
        rho: share of the variance that is common in ``"rho"``, 0..1.
    """

    sharing: str = "share"
    fill: str = "shared"
    static_px: float = 0.5
    soft: bool = False
    rho: float = 0.9

    def __post_init__(self) -> None:
        for name, value, allowed in (("sharing", self.sharing, SHARINGS), ("fill", self.fill, FILLS)):
            if value not in allowed:
                raise ValueError(f"noise.{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not isinstance(self.soft, bool):
            raise TypeError(f"noise.soft must be True or False, got {self.soft!r}")
        if not 0 <= self.static_px < float("inf"):
            raise ValueError(f"noise.static_px must be a number of at least 0, got {self.static_px!r}")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"noise.rho must be within 0..1, got {self.rho!r}")

    @property
    def needs_flow(self) -> bool:
        """Whether noise follows optical flow."""
        return self.sharing in ("warp_blend", "static_mask")


class FrameNoise:
    """The noise of a clip's frames on the full canvas, shared as `NoiseOptions` says.

    Every field has mean 0 and variance 1 in each pixel.

    Args:
        seed: 0..2^63-1.
        shape: ``(C, h, w)`` of what is denoised, for the whole canvas.
        frames: number of frames T of the clip.
        options: how frames share noise.
        flow_forward, flow_backward: ``[T-1, 2, H, W]``, from frame i to i+1 and back, in pixels of that size; only
            modes that follow flow need them. Another size than the canvas is resized (a latent canvas).
        occ_forward, occ_backward: bool ``[T-1, H, W]``, where that flow is occluded.
        first: number of the first frame in the whole video; frames have their own fields by that number.

    Raises:
        ValueError: a mode without the flow it needs, or tensors that do not fit the clip.

    Example:
        >>> FrameNoise(0, (3, 64, 64), frames=8)("step", range(8), step=990).shape
        torch.Size([8, 3, 64, 64])
    """

    def __init__(
        self,
        seed: int,
        shape: Sequence[int],
        frames: int,
        options: NoiseOptions | None = None,
        *,
        flow_forward: Tensor | None = None,
        flow_backward: Tensor | None = None,
        occ_forward: Tensor | None = None,
        occ_backward: Tensor | None = None,
        first: int = 0,
    ) -> None:
        self.seed, self.frames, self.options = seed, frames, options or NoiseOptions()
        self.first = first
        self.shape = tuple(shape)
        if len(self.shape) != 3 or min(self.shape) < 1 or frames < 1 or first < 0:
            raise ValueError(
                f"expected shape (C, h, w), at least one frame and a first one of at least 0, got {self.shape}, "
                f"{frames} and {first}"
            )
        key(seed, "initial")
        self._origin = self._start = self._still = None
        if not self.options.needs_flow or frames == 1:
            return
        backward, mask = self._on_canvas("backward", flow_backward, occ_backward)
        if self.options.sharing == "warp_blend":
            self._origin, self._start = origins(backward, mask)
            return
        forward, mask_forward = self._on_canvas("forward", flow_forward, occ_forward)
        # Frame i looks back to frame i-1; the first has none and looks forward.
        flow, mask = torch.cat((forward[:1], backward)), torch.cat((mask_forward[:1], mask))
        self._still = still(flow, mask, self.options.static_px, self.options.soft)

    def _on_canvas(self, direction: str, flow: Tensor | None, occluded: Tensor | None) -> tuple[Tensor, Tensor]:
        if flow is None or occluded is None:
            raise ValueError(f"noise.sharing={self.options.sharing!r} needs flow_{direction} and occ_{direction}")
        count, grid = self.frames - 1, (self.shape[1], self.shape[2])
        if flow.ndim != 4 or tuple(flow.shape[:2]) != (count, 2) or occluded.shape != flow[:, 0].shape:
            raise ValueError(
                f"expected flow_{direction} [{count}, 2, H, W] and occ_{direction} [{count}, H, W], "
                f"got {tuple(flow.shape)} and {tuple(occluded.shape)}"
            )
        flow, occluded = flow.detach().float().cpu(), occluded.cpu()
        bad = ~torch.isfinite(flow).all(1)
        flow, occluded = flow.masked_fill(bad[:, None], 0.0), occluded | bad
        if tuple(flow.shape[2:]) != grid:
            flow, occluded = resize_flow(flow, grid), pool_occlusion(occluded, grid)
        return reliable(flow, occluded)

    def __call__(
        self,
        kind: str,
        frames: Sequence[int],
        *,
        step: int = -1,
        visit: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the fields of some frames, ``[len(frames), C, h, w]``.

        Args:
            kind: ``"initial"``, ``"step"`` or ``"travel"``.
            frames: indices in the clip, 0..T-1.
            step: training step; -1 for ``"initial"``.
            visit: how often that step ran before (``"travel"``: was returned to before).

        Raises:
            ValueError: an unknown kind, a frame that is not in the clip.
        """
        if kind not in ("initial", "step", "travel"):
            raise ValueError(f"kind must be initial, step or travel, got {kind!r}")
        outside = [frame for frame in frames if not 0 <= frame < self.frames]
        if outside:
            raise ValueError(f"frames must be within 0..{self.frames - 1}, got {outside}")
        drawn: dict[int, Tensor] = {}

        def draw(frame: int) -> Tensor:
            if frame not in drawn:
                number = SHARED if frame == SHARED else self.first + frame
                drawn[frame] = normal(self.seed, kind, self.shape, step=step, frame=number, visit=visit)
            return drawn[frame]

        fields = [self._blend(frame, draw) for frame in frames]
        if not fields:
            return torch.empty(0, *self.shape, dtype=dtype, device=device)
        return torch.stack(fields).to(device, dtype)

    def _blend(self, frame: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Return the field of one frame, ``[C, h, w]``; ``draw(f)`` is the raw field of frame f."""
        sharing = self.options.sharing
        if sharing == "none":
            return draw(frame)
        if sharing == "rho":
            return self.options.rho**0.5 * draw(SHARED) + (1 - self.options.rho) ** 0.5 * draw(frame)
        if self._still is not None:
            share = self._still[frame]
            return share.sqrt() * draw(SHARED) + (1 - share).sqrt() * draw(frame)
        if self._origin is None or self._start is None:  # "share", and any mode of a single frame
            return draw(SHARED)
        origin, start = self._origin[frame].long(), self._start[frame]
        if self.options.fill == "shared":
            return draw(SHARED).flatten(1)[:, origin].reshape(self.shape)
        result = torch.empty(self.shape).flatten(1)
        for first in start.unique().tolist():
            chosen = start == first
            result[:, chosen] = draw(first).flatten(1)[:, origin[chosen]]
        return result.reshape(self.shape)
