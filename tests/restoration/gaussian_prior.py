"""A Gaussian prior, whose denoiser and posterior are known, and the sampler without anything temporal."""

from __future__ import annotations

import torch

from zsvr import noise, operators, samplers, schedule
from zsvr.hosts import Step
from zsvr.priors.base import Prior

ABAR = schedule.alphas_bar(schedule.linear_betas())


class GaussianPrior(Prior):
    """The exact denoiser of ``x0 ~ N(mean, C)``: ``E[x0 | x]`` in closed form.

    Args:
        mean: ``[3, H, W]``. covariance: ``[3HW, 3HW]``, or ``[]`` for a multiple of the identity.
    """

    channels, multiple = 3, 1

    def __init__(self, mean, covariance):
        self.alphas_bar = ABAR
        self.size = tuple(mean.shape[1:])
        self.mean = mean
        self.covariance = (
            covariance.expand(1, 1) * torch.eye(mean.numel()).to(mean) if not covariance.ndim else covariance
        )
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def predict(self, x, step):
        a = float(self.alphas_bar[step])
        centred = x.flatten(1) - a**0.5 * self.mean.flatten()
        gain = a**0.5 * self.values / (a * self.values + 1 - a)
        x0 = self.mean + ((centred @ self.vectors * gain) @ self.vectors.T).reshape(x.shape)
        return samplers.predict_eps(x, x0, a), None

    def posterior(self, matrix, y, variance):
        """Return mean and covariance of x0 given ``y = matrix x0 + N(0, variance)``."""
        gain = self.covariance @ matrix.T
        system = matrix @ gain + variance * torch.eye(len(matrix)).to(matrix)
        solve = torch.linalg.pinv(system, rtol=1e-9, hermitian=True)
        mean = self.mean.flatten() + gain @ solve @ (y.flatten() - matrix @ self.mean.flatten())
        return mean.reshape(self.mean.shape), self.covariance - gain @ solve @ gain.T

    def describe(self):
        return {}


def restore(prior, host, operator, y, *, steps=100, stop_step=0, seed=0, travel=(1, 1), quiet=False):
    """The sampler without anything temporal; every frame has noise of its own.

    With a Gaussian prior the states of ddnm and ddnm+ are affine in the noise, so without any (``quiet``) the result
    is exactly the mean of all samples.
    """
    T, canvas, dtype = len(y), prior.size, y.dtype
    fields = noise.FrameNoise(seed, (3, *canvas), T, noise.NoiseOptions("none"))
    if quiet:

        def fields(kind, frames, **of_step):
            return torch.zeros(T, 3, *canvas, dtype=dtype)

    S = schedule.spaced_steps(steps)
    ks = schedule.last_index(S, stop_step)
    state = host.start(y, operator, seed)
    x = fields("initial", range(T), dtype=dtype)
    x0_raw = x
    for op in schedule.plan_operations(steps, ks, *travel):
        a = float(prior.alphas_bar[S[op.k]])
        if op.back:
            x = samplers.add_noise(x0_raw, fields("travel", range(T), step=S[op.k], visit=op.visit, dtype=dtype), a)
            continue
        with torch.set_grad_enabled(host.needs_network_gradient):
            x = x.detach().requires_grad_(host.needs_network_gradient)
            eps, frac = prior.predict(x, S[op.k])
            x0_raw = samplers.predict_x0(x, eps, a)
            x0 = x0_raw.clamp(-1, 1) if host.clips_x0 else x0_raw
            last = op.k == ks
            a_full = float(prior.alphas_bar[S[op.k + 1]]) if op.k + 1 < steps else 1.0
            z = torch.zeros_like(x) if last else fields("step", range(T), step=S[op.k], visit=op.visit, dtype=dtype)
            step = Step(
                k=op.k, K=steps, N=1000, training_step=S[op.k], a=a, a_next=1.0 if last else a_full, a_schedule=a_full,
                is_last=last, x=x, x0=x0, eps=eps.detach(), frac=frac, z=z, shift=torch.zeros_like(x),
                held=torch.zeros(T, dtype=torch.bool),
            )  # fmt: skip
            x, result = host.advance(step, y, operator, state)
        x0_raw = x0_raw.detach()
    return result


def make_step(shape, seed=0, *, k=50, K=100, last=False, stop=False, dtype=torch.float64, **changes):
    """A step with random contents."""
    generator = torch.Generator().manual_seed(seed)
    x, x0, eps, z = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(4))
    S = schedule.spaced_steps(K)
    a, a_full = float(ABAR[S[k]]), float(ABAR[S[k + 1]]) if k + 1 < K else 1.0
    last = last or stop
    known = dict(
        k=k, K=K, N=1000, training_step=S[k], a=a, a_next=1.0 if last else a_full, a_schedule=a_full, is_last=last,
        x=x, x0=x0, eps=eps, frac=None, z=torch.zeros_like(z) if last else z, shift=torch.zeros_like(x),
        held=torch.zeros(shape[0], dtype=torch.bool),
    )  # fmt: skip
    return Step(**{**known, **changes})


def dense(operator, canvas):
    n = 3 * canvas[0] * canvas[1]
    return operator.A(torch.eye(n, dtype=torch.float64).reshape(n, 3, *canvas)).reshape(n, -1).T


def smooth_prior(H, W, seed=0, dtype=torch.float64):
    """A Gaussian over frames with a random mean, smooth in space and correlated between channels."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    at = torch.stack((y, x), -1).reshape(-1, 2).to(dtype)
    space = 0.25 * torch.exp(-0.5 * torch.cdist(at, at).square() / 1.5**2) + 0.02 * torch.eye(H * W).to(dtype)
    colour = torch.tensor([[1.0, 0.7, 0.5], [0.7, 1.0, 0.7], [0.5, 0.7, 1.0]]).to(dtype)
    mean = 0.3 * torch.randn(3, H, W, dtype=dtype, generator=generator)
    return GaussianPrior(mean, torch.kron(colour, space))


EXACT = {
    "inpaint": lambda: operators.make("inpaint", ratio=0.5),
    "gray": lambda: operators.make("gray"),
    "sr_avg": lambda: operators.make("sr_avg", scale=2),
    "sr_bicubic": lambda: operators.make("sr_bicubic", scale=2),
    "gray_sr": lambda: operators.make("compose", operators=[operators.make("gray"), operators.make("sr_avg", scale=2)]),
    "sr_inpaint": lambda: operators.make(
        "compose", operators=[operators.make("sr_avg", scale=2), operators.make("inpaint", ratio=0.3)]
    ),
}
EVERY = {
    **EXACT,
    "denoise": lambda: operators.make("denoise"),
    "blur_sep": lambda: operators.make("blur_sep", kernel="gaussian:5,1.5"),
    "blur_fft": lambda: operators.make("blur_fft", kernel="motion:5,30"),
    "blur_reflect": lambda: operators.make("blur_fft", kernel="gaussian:3,0.7", fft_pad="reflect", pinv="cg"),
    "blur_mirror": lambda: operators.make("blur_fft", kernel="gaussian:5,1.5", fft_pad="reflect"),
}


def moments(prior, advance, steps):
    """Return the exact mean and covariance of what an affine sampler draws.

    Args:
        advance: function of a `Step` for many states that returns the next ones.
    """
    n = prior.mean.numel()
    S = schedule.spaced_steps(steps)
    mean, covariance = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    nothing, unit = torch.zeros(1 + n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    # Frames: the mean, then unit changes of the state, then unit changes of the noise.
    z = torch.cat((nothing, unit)).reshape(-1, *prior.mean.shape)
    for k in range(steps):
        states = torch.cat((mean[None], mean + unit, mean.expand(n, n)))
        last = k + 1 == steps
        x = states.reshape(z.shape)
        eps, _ = prior.predict(x, S[k])
        x0 = samplers.predict_x0(x, eps, float(ABAR[S[k]]))
        fresh = torch.zeros_like(z) if last else z
        after = advance(make_step(x.shape, k=k, K=steps, last=last, x=x, x0=x0, eps=eps, z=fresh)).flatten(1)
        mean, of_state, of_noise = after[0], after[1 : 1 + n] - after[0], after[1 + n :] - after[0]
        covariance = of_state.T @ covariance @ of_state + of_noise.T @ of_noise
    return mean.reshape(prior.mean.shape), covariance


def distance(a, b):
    return float((a - b).norm() / b.norm())


def some_measurement(operator, prior, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return operator.A(prior.mean + 0.5 * torch.randn(1, *prior.mean.shape, dtype=torch.float64, generator=generator))


def differentiable_step(prior, y, held=None, seed=0):
    """A step whose x0 is a function of x that autograd knows."""
    x = torch.randn(len(y), *prior.mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    eps, _ = prior.predict(x, 300)
    x0 = samplers.predict_x0(x, eps, float(ABAR[300])).clamp(-1, 1)
    changes = {} if held is None else {"held": held}
    return make_step(tuple(x.shape), x=x, x0=x0, eps=eps.detach(), **changes)
