"""The loop: a prior, an operator, a host and the temporal parts, step by step, shot by shot."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import zsvr_kernels as zk
from zsvr import samplers, schedule
from zsvr.flow import Flow
from zsvr.hosts.base import Host, Step
from zsvr.noise import FrameNoise
from zsvr.operators.base import Operator, to_unit
from zsvr.priors.base import Prior
from zsvr.temporal.guidance import ConsistencyGuidance, ImageEncoder
from zsvr.temporal.settings import Temporal
from zsvr_kernels.links import inside_pixels, pool_occlusion, resize_flow

LATENT_HOSTS = ("project", "none")


@dataclass(frozen=True)
class Sampling:
    """The schedule.

    Attributes:
        steps: K; None: the host's.
        spacing: ``"leading"``, ``"trailing"`` or ``"linspace"``; see `zsvr.schedule.spaced_steps`.
        travel: (length, repeat) of time travel; (1, 1): off.
        latent_host: how a host for pixels acts with a prior of latents: ``"project"``: on the decoded estimate, which
            is encoded again; ``"none"``: not at all.
        latent_every: ``"project"`` acts at every so many steps, and at the last.
    """

    steps: int | None = None
    spacing: str = "leading"
    travel: tuple[int, int] = (1, 1)
    latent_host: str = "project"
    latent_every: int = 5

    def __post_init__(self) -> None:
        if self.latent_host not in LATENT_HOSTS:
            raise ValueError(f"latent.host must be one of {', '.join(LATENT_HOSTS)}, got {self.latent_host!r}")
        if self.latent_every < 1:
            raise ValueError(f"latent.every must be at least 1, got {self.latent_every}")
        if len(self.travel) != 2:
            raise ValueError(f"sampler.travel must be (length, repeat), got {self.travel!r}")


@dataclass(frozen=True)
class Report:
    """What a callback learns after each operation: where the run is and the current estimate."""

    done: int
    total: int
    training_step: int
    frames: range
    x0: Tensor  # [T, C, h, w] of these frames, corrected; in the model's range


class NotFiniteError(ArithmeticError):
    """The prior or the host produced a value that is not finite."""


class Restoration:
    """One restoration: everything is checked here, `run` samples.

    Args:
        y: measurements ``[T, Cy, Hy, Wy]`` in the model's range [-1, 1], on the prior's device.
        operator: what was done to the frames; its canvas must suit the prior.
        prior: the image diffusion model.
        host: the restoration method; see `zsvr.hosts.make`.
        temporal: which temporal parts are on.
        sampling: the schedule.
        flow: of the clip on its canvas, checked; needed where ``temporal.needs_flow`` and there is more than one frame.
        seed: 0..2^63-1, of all noise.
        first: number of the first frame in the whole video; noise belongs to frames by number.
        expected_count: how many attention layers are replaced; None: what the prior says, where all are.
        encoder: image encoder of the semantic level of guidance.
        reestimate: gives the flow of frames ``[T, 3, Hc, Wc]`` in [0, 1], for ``flow.refresh_every``.

    Raises:
        ValueError: parts that do not fit each other; the message says which and what would.
    """

    def __init__(
        self,
        y: Tensor,
        operator: Operator,
        prior: Prior,
        host: Host,
        temporal: Temporal | None = None,
        sampling: Sampling | None = None,
        *,
        flow: Flow | None = None,
        seed: int = 0,
        first: int = 0,
        expected_count: int | None = None,
        encoder: ImageEncoder | None = None,
        reestimate: Callable[[Tensor], Flow] | None = None,
    ) -> None:
        self.y, self.operator, self.prior, self.host = y, operator, prior, host
        self.temporal = Temporal() if temporal is None else temporal
        self.sampling = Sampling() if sampling is None else sampling
        self.seed, self.first, self.encoder, self.reestimate = seed, first, encoder, reestimate
        self.expected_count = expected_count
        if y.dim() != 4 or not len(y):
            raise ValueError(f"measurements must be [T, C, H, W] with at least one frame, got {tuple(y.shape)}")
        if not bool(torch.isfinite(y).all()):
            bad_frames = (~torch.isfinite(y)).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"measurements must be finite: frames {bad_frames[:8]} hold NaN or infinity")
        self.canvas = operator.canvas((y.shape[2], y.shape[3]))
        measured = operator.measured_shape(self.canvas)
        if tuple(y.shape[1:]) != measured:
            raise ValueError(
                f"{operator} measures {measured} on a canvas {self.canvas}, got frames {tuple(y.shape[1:])}"
            )
        bad = [side for side in self.canvas if side % prior.multiple]
        if bad:
            raise ValueError(
                f"the prior takes sides that are multiples of {prior.multiple} pixels, but the canvas of this clip is "
                f"{self.canvas[0]}x{self.canvas[1]}: crop or resize it first (prepare='square' makes it "
                f"{prior.size[0]}x{prior.size[1]})"
            )
        if prior.factor > 1 and self.acts_on_latents and getattr(host, "scale_by_variance", False):
            raise ValueError("gdp.scale_by_variance does nothing with a latent prior, whose host acts without noise")
        self.frames = len(y)
        self.size = (self.canvas[0] // prior.factor, self.canvas[1] // prior.factor)
        needs_flow = self.temporal.needs_flow and self.frames > 1
        if needs_flow and flow is None:
            raise ValueError("the temporal parts that are on follow optical flow: give flow, or switch them off")
        if flow is not None and (flow.frames != self.frames or tuple(flow.forward.shape[2:]) != self.canvas):
            raise ValueError(
                f"flow must be of {self.frames} frames on the canvas {self.canvas}, got {flow.frames} on "
                f"{tuple(flow.forward.shape[2:])}"
            )
        self.flow = flow if self.frames > 1 else None
        N = len(prior.alphas_bar)
        self.K = min(host.default_steps, N) if self.sampling.steps is None else self.sampling.steps
        self.steps = schedule.spaced_steps(self.K, N, self.sampling.spacing)
        self.last = schedule.last_index(self.steps, self.temporal.stop_step)
        self.operations = schedule.plan_operations(self.K, self.last, *self.sampling.travel)
        self.levels = [prior.level(step) for step in self.steps]
        self.noise = self._frame_noise()
        self.patch: zk.PatchReport | None = None

    @property
    def acts_on_latents(self) -> bool:
        """Whether the host acts on decoded estimates of a latent prior."""
        return self.prior.factor > 1 and self.sampling.latent_host == "project"

    def host_acts(self, k: int) -> bool:
        """Return whether the host corrects the estimate of step k."""
        every = self.sampling.latent_every
        return self.prior.factor == 1 or (self.acts_on_latents and (k % every == 0 or k == self.last))

    @property
    def shots(self) -> list[range]:
        """The frames between cuts; each shot is restored by itself."""
        cuts = [] if self.flow is None else (self.flow.cuts.nonzero().flatten() + 1).tolist()
        return [range(a, b) for a, b in itertools.pairwise([0, *cuts, self.frames])]

    def _frame_noise(self) -> FrameNoise:
        shape = (self.prior.channels, *self.size)
        fields: dict[str, Tensor] = {}
        if self.flow is not None and self.temporal.noise.needs_flow:
            names = {"flow_forward": "forward", "flow_backward": "backward"}
            names |= {"occ_forward": "occ_forward", "occ_backward": "occ_backward"}
            fields = {name: getattr(self.flow, source) for name, source in names.items()}
        return FrameNoise(self.seed, shape, self.frames, self.temporal.noise, first=self.first, **fields)

    def run(self, callback: Callable[[Report], None] | None = None) -> Tensor:
        """Restore the clip.

        Args:
            callback: called after every operation.

        Returns:
            ``[T, 3, Hc, Wc]`` in [0, 1].

        Raises:
            NotFiniteError: the prior or the host gave NaN or infinity; says at which step.
        """
        parts, state, done = [], None, 0
        total = len(self.operations) * len(self.shots)
        for shot in self.shots:
            window = _Window(self, shot, state)
            with window.installed():
                for report in window.run(done, total):
                    if callback is not None:
                        callback(report)
            state, done = window.state, done + len(self.operations)
            with torch.no_grad():
                parts.append(to_unit(self.prior.decode(window.result)))
        return torch.cat(parts)


class _Window:
    """Some frames of a clip that see each other: their context, guidance, host state and the state of sampling."""

    def __init__(self, clip: Restoration, ids: range, previous: Any) -> None:
        self.clip, self.ids = clip, ids
        device = clip.y.device
        self.y = clip.y[ids.start : ids.stop]
        self.operator = clip.operator.select(ids)
        self.held = torch.zeros(len(ids), dtype=torch.bool, device=device)
        flow = None if clip.flow is None else clip.flow.window(ids).to(device)
        self.context = self._context(flow)
        self.guidance = self._guidance(flow)
        self.state = clip.host.start(self.y, self.operator, clip.seed, previous)
        self.result = torch.empty(0)

    # ---- temporal parts ----

    def _context(self, flow: Flow | None) -> zk.VideoContext | None:
        clip = self.clip
        if clip.temporal.slr is None:
            return None
        options = clip.temporal.slr
        if flow is None or len(self.ids) == 1:
            needs = options.combine not in ("cross", "spatial")
            options = options.with_(combine="cross") if needs else options  # one frame has no trajectory to follow
            return zk.VideoContext(frames=len(self.ids), ids=list(self.ids), options=options, size=clip.size)
        return flow.context(options=options, ids=list(self.ids), size=clip.size)

    def _guidance(self, flow: Flow | None) -> ConsistencyGuidance | None:
        options, clip = self.clip.temporal.guidance, self.clip
        if options is None or len(self.ids) == 1:
            return None
        decode = clip.prior.decode if clip.prior.factor > 1 else None
        if flow is None:  # the semantic level follows none
            still = torch.zeros(len(self.ids) - 1, 2, *clip.size, device=clip.y.device)
            nowhere = torch.zeros(len(self.ids) - 1, *clip.size, dtype=torch.bool, device=clip.y.device)
            return ConsistencyGuidance(
                options, still, still, nowhere, nowhere, ids=list(self.ids), encoder=clip.encoder, decode=decode
            )
        fields = []
        for field, occ in ((flow.forward, flow.occ_forward), (flow.backward, flow.occ_backward)):
            if clip.size != clip.canvas:
                field, occ = resize_flow(field, clip.size), pool_occlusion(occ, clip.size)
            fields.append((field, ~occ & inside_pixels(field)))
        (forward, good_forward), (backward, good_backward) = fields
        return ConsistencyGuidance(
            options, forward, backward, good_forward, good_backward,
            ids=list(self.ids), encoder=clip.encoder, decode=decode,
        )  # fmt: skip

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Patch the prior's network, and checkpoint it where the host wants that, for the length of the block."""
        clip = self.clip
        model: Any = clip.prior.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(checkpointed(model, clip.host))
            if self.context is not None:
                options, default = self.context.options, zk.SLROptions()
                names = ("layers", "stages", "min_tokens", "max_tokens")
                takes_all = all(getattr(options, name) == getattr(default, name) for name in names)
                count = clip.expected_count
                if count is None and takes_all:
                    count = clip.prior.expected_count
                patch = zk.patched(model, self.context, expected_count=count)
                clip.patch = stack.enter_context(patch)
            yield

    @torch.no_grad()
    def _refresh(self, x0: Tensor) -> None:
        """Estimate the flow again from the clean estimate; links and guidance follow it, history is forgotten."""
        clip = self.clip
        if clip.reestimate is None or len(self.ids) == 1:
            return
        flow = clip.reestimate(to_unit(clip.prior.decode(x0))).to(x0.device)
        self.guidance = self._guidance(flow)
        if self.context is not None and clip.patch is not None and clip.temporal.slr is not None:
            options = {name: getattr(clip.temporal.slr, name) for name in ("resize", "occ_pool")}
            for grid in {layer.grid for layer in clip.patch.patched if layer.grid is not None}:
                self.context.set_links(flow.links(grid, **options))

    # ---- sampling ----

    def _noise(self, kind: str, step: int = -1, visit: int = 0) -> Tensor:
        y = self.clip.y
        return self.clip.noise(kind, self.ids, step=step, visit=visit, device=y.device, dtype=y.dtype)

    def run(self, done: int, total: int) -> Iterator[Report]:
        """Sample; yields a report after every operation and leaves the frames' clean estimate in ``result``."""
        clip = self.clip
        x, raw = self._noise("initial"), None
        for operation in clip.operations:
            k = operation.k
            if operation.back:
                assert raw is not None
                x = samplers.add_noise(raw, self._noise("travel", clip.steps[k], operation.visit), clip.levels[k])
            else:
                opened = contextlib.nullcontext() if self.context is None else self.context.step(k, clip.K)
                with opened:
                    x, raw, self.result = self._step(x, k, operation.visit)
                every = clip.temporal.flow.refresh_every
                if every and 2 * k >= clip.K and k % every == 0 and k < clip.last:
                    self._refresh(raw)
            done += 1
            yield Report(done, total, clip.steps[k], self.ids, self.result)

    def _step(self, x: Tensor, k: int, visit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next x, the network's own clean estimate, and the corrected one."""
        clip, prior, host = self.clip, self.clip.prior, self.clip.host
        a, is_last = clip.levels[k], k == clip.last
        a_schedule = clip.levels[k + 1] if k + 1 < clip.K else 1.0
        a_next = 1.0 if is_last else a_schedule
        variance = schedule.coefficients(a, a_next).var_small
        through = self.guidance is not None and self.guidance.needs_network_gradient(k, clip.K)
        differentiates = host.needs_network_gradient and clip.host_acts(k)
        pixels = prior.factor == 1
        with torch.set_grad_enabled(differentiates or through):
            x = x.detach().requires_grad_(differentiates or through)
            eps, frac = prior.predict(x, clip.steps[k])
            raw = samplers.predict_x0(x, eps, a)
            _check_finite(raw, "the prior's prediction", clip.steps[k])  # clamped, infinity would pass for white
            x0 = raw.clamp(-1, 1) if host.clips_x0 and pixels else raw
            if self.guidance is not None:
                x0 = self.guidance.blend(x0, k, clip.K)
            added = None
            if through:
                assert self.guidance is not None
                added = self.guidance.shift_through(x, x0, k, clip.K, held=self.held, variance=variance)
        if not differentiates:  # low light's state would keep every step's graph
            x, x0, frac = x.detach(), x0.detach(), None if frac is None else frac.detach()
        shift = torch.zeros_like(x0.detach())
        if self.guidance is not None:
            shift = self.guidance.shift(x0.detach(), k, clip.K, held=self.held, variance=variance)
        z = torch.zeros_like(shift) if is_last else self._noise("step", clip.steps[k], visit)
        step = Step(
            k=k, K=clip.K, N=len(prior.alphas_bar), training_step=clip.steps[k], a=a,
            a_next=a_next, a_schedule=a_schedule, is_last=is_last, x=x, x0=x0, eps=eps.detach(), frac=frac, z=z,
            shift=shift, held=self.held,
        )  # fmt: skip
        with torch.set_grad_enabled(differentiates):
            if pixels:
                x, corrected = host.advance(step, self.y, self.operator, self.state)
            else:
                x, corrected = self._advance_latents(step)
        if added is not None:
            x = x + added
            corrected = corrected + added if is_last else corrected
        _check_finite(x, f"host {host.name!r}", clip.steps[k])
        return x.detach(), raw.detach(), corrected.detach()

    def _advance_latents(self, step: Step) -> tuple[Tensor, Tensor]:
        """Let the host correct the decoded estimate, as if at its last step, and go on in latents by DDNM's rule.

        A host that differentiates through the network does so through the decoder, too, and goes on by DDPM's rule.
        """
        clip, prior, host = self.clip, self.clip.prior, self.clip.host
        if host.needs_network_gradient and clip.acts_on_latents:
            if clip.host_acts(step.k):
                step.picture = _decoded(prior, step.x0, host)
                return host.advance(step, self.y, self.operator, self.state)
            x = samplers.ddpm(step.x, step.x0, step.eps, step.frac, step.z, step.a, step.a_next)
            return x + step.shift, step.x0 + step.shift
        x0 = step.x0 + step.shift
        if clip.host_acts(step.k):
            u = prior.decode(x0).clamp(-1, 1)
            none = torch.zeros_like(u)
            pixels = Step(
                k=step.k, K=step.K, N=step.N, training_step=step.training_step, a=step.a, a_next=1.0,
                a_schedule=step.a_schedule, is_last=True, x=u, x0=u, eps=none, frac=None, z=none, shift=none,
                held=step.held,
            )  # fmt: skip
            _, u = host.advance(pixels, self.y, self.operator, self.state)
            x0 = prior.encode(u)
        rule = samplers.ddnm(getattr(host, "eta", 0.85))
        return rule(step.x.detach(), x0, step.eps, step.frac, step.z, step.a, step.a_next), x0


def _decoded(prior: Prior, x0: Tensor, host: Host) -> Tensor:
    """Return latents as pictures, clamped where the host clips.

    Where the host wants checkpoints, the backward holds one frame's activations at a time.
    """
    if getattr(host, "checkpoint", False):
        pictures = torch.cat([checkpoint(prior.decode, latent, use_reentrant=False) for latent in x0.split(1)])
    else:
        pictures = prior.decode(x0)
    return pictures.clamp(-1, 1) if host.clips_x0 else pictures


@contextlib.contextmanager
def checkpointed(model: Any, host: Host) -> Iterator[None]:
    """Let the network recompute activations in its backward for the length of the block, if the host wants that."""
    wants = host.needs_network_gradient and getattr(host, "checkpoint", False)
    if not wants or not hasattr(model, "enable_gradient_checkpointing") or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def _check_finite(x: Tensor, what: str, step: int) -> None:
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        raise NotFiniteError(
            f"{what} is not finite at training step {step}, frames {bad[:8]}: in fp16 try bf16 or fp32; with dps or "
            "gdp a smaller scale; a damaged checkpoint gives it at the first step"
        )


def describe_shots(shots: Sequence[range]) -> str:
    """Return shots as text: ``0-11, 12-15``."""
    return ", ".join(f"{shot.start}-{shot.stop - 1}" for shot in shots)
