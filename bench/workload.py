"""A case made concrete: inputs, ours, the peers, the correctness check, and the work that the roofline counts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import zsvr_kernels as zk
from bench import peers
from bench.shapes import DTYPES, WINDOW, Case
from zsvr_kernels import inverse_index, testing
from zsvr_kernels.ops.chain_links.reference import chain_links_reference
from zsvr_kernels.ops.correspondence_search.reference import correspondence_search_reference, link_score_reference
from zsvr_kernels.ops.cross_frame_attention.reference import cross_frame_attention_reference
from zsvr_kernels.ops.trajectory_attention.reference import trajectory_attention_reference
from zsvr_kernels.plain import PlainAttention
from zsvr_kernels.sampling import nearest_site

Call = Callable[[], Any]
ORACLE_FLOPS = 3e9  # a case with more work is checked on its first and last head


@dataclass
class Workload:
    """What a case runs. ``contestants["ours"]`` is the operator; the others are peers and variants of ours."""

    contestants: dict[str, Call]
    check: Callable[[], None]  # raises AssertionError where ours is outside the error budget
    flops: float | None = None
    bytes: float | None = None  # through the first-level cache (trajectory attention)
    traffic: float | None = None  # from and to memory at least: inputs once, outputs once
    left_out: dict[str, str] = field(default_factory=dict)  # peer -> why it does not run


def tokens(case: Case, *, grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return seeded q, k, v and a gradient of the output, each ``[1, T, P, H, D]``."""
    shape = (4, 1, case.T, case.P, case.shape.H, case.shape.D)
    q, k, v, d_o = _normal(case, shape).unbind(0)
    if grad:
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    return q, k, v, d_o


def _normal(case: Case, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator(case.device).manual_seed(20240701)
    return torch.randn(shape, generator=generator, device=case.device).to(DTYPES[case.dtype])


def flow(case: Case) -> Tensor:
    """Return a smooth random flow ``[1, T-1, 2, Hg, Wg]`` of a few tokens per frame."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(case.T - 1, 2, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=case.shape.grid, mode="bilinear", align_corners=False)[None].to(
        case.device
    )


def links(case: Case) -> zk.Links:
    """Return links of that flow, its inverse taken as its negative."""
    forward = flow(case)
    return zk.Links.from_flow(forward, -forward, grid=case.shape.grid, check="none")


def _heads(case: Case, flops: float) -> list[int]:
    H = case.shape.H
    if case.P >= 4096 and case.direction != "fwd":
        return [H - 1]  # the oracle keeps the scores of every frame
    return list(range(H)) if flops <= ORACLE_FLOPS else sorted({0, H - 1})


def _differentiate(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], d_o: Tensor | None
) -> list[Tensor]:
    """Return the output and, if ``d_o`` is given, the gradients of the inputs."""
    if d_o is None:
        with torch.no_grad():
            return [forward(*inputs)]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = forward(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_o)]


def _checker(
    case: Case,
    flops: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
    ours: Callable[[Tensor, Tensor, Tensor], Tensor],
    reference: Callable[[Tensor, Tensor, Tensor], Tensor],
    eager: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[], None]:
    """Return the check of an attention operator: heads do not mix, so the oracle may take a few of them."""

    def check() -> None:
        heads = _heads(case, flops * (1 if case.direction == "fwd" else 3))
        inputs = [x.detach() for x in (q, k, v)]
        gradient = None if case.direction == "fwd" else d_o
        part = [x[..., heads, :].contiguous() for x in inputs]
        some = None if gradient is None else gradient[..., heads, :].contiguous()
        wide = None if some is None else some.double()
        got = _differentiate(ours, inputs, gradient)
        oracle = _differentiate(reference, [x.double() for x in part], wide)
        plain = _differentiate(eager, part, some)
        for what, x, o, e in zip(("out", "dq", "dk", "dv"), got, oracle, plain, strict=False):
            testing.assert_within_budget(x[..., heads, :], o, e, f"{case.name} {what}", gradient=what != "out")

    return check


def _directed(case: Case, forwards: dict[str, Call], inputs: tuple[Tensor, ...], d_o: Tensor) -> dict[str, Call]:
    """Turn forward functions into what the case's direction times."""
    if case.direction == "fwd":
        return {name: torch.no_grad()(forward) for name, forward in forwards.items()}
    if case.direction == "step":

        def step(forward: Call) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), inputs, d_o)

        return {name: functools.partial(step, forward) for name, forward in forwards.items()}

    def backward(graph: Call) -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph(), inputs, d_o, retain_graph=True)

    directed: dict[str, Call] = {}
    for name, forward in forwards.items():  # the first call runs the forward and keeps its graph
        directed[name] = functools.partial(backward, functools.cache(forward))
    directed["ours_forward"] = torch.no_grad()(forwards["ours"])
    return directed


def _split(found: dict[str, peers.Peer | str]) -> tuple[dict[str, Call], dict[str, str]]:
    runs = {name: peer for name, peer in found.items() if not isinstance(peer, str)}
    return runs, {name: why for name, why in found.items() if isinstance(why, str)}


def cross_frame_attention(case: Case) -> Workload:
    """Neighbour frames i-1 and i+1, the method's default."""
    q, k, v, d_o = tokens(case, grad=case.direction != "fwd")
    frames = zk.neighbors(case.T).to(case.device)
    pairs = int((frames >= 0).sum())
    flops = 4.0 * case.C * case.P**2 * pairs
    scale = case.shape.D**-0.5
    runs, left_out = _split(peers.cross_frame_attention(q, k, v, frames))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return zk.cross_frame_attention(q, k, v, frames, backend=case.backend)

    forwards: dict[str, Call] = {"ours": lambda: ours(q, k, v)}
    if case.direction == "fwd":
        out = torch.empty_like(q)
        forwards["ours_out"] = lambda: zk.cross_frame_attention(q, k, v, frames, backend=case.backend, out=out)
    if case.direction == "fwd" or case.device != "cpu":
        forwards["ours_sdpa"] = lambda: zk.cross_frame_attention(q, k, v, frames, backend="sdpa")
    forwards |= runs

    check = _checker(
        case, flops, q, k, v, d_o, ours,
        lambda q, k, v: cross_frame_attention_reference(q, k, v, frames, scale)[0],
        lambda q, k, v: testing.eager_cross_frame_attention(q, k, v, frames, scale)[0],
    )  # fmt: skip
    counted = {"fwd": flops, "bwd": 2.5 * flops, "step": 3.5 * flops}[case.direction]
    traffic = 4.0 * q.numel() * q.element_size() if case.direction == "fwd" else None
    return Workload(_directed(case, forwards, (q, k, v), d_o), check, counted, None, traffic, left_out)


def trajectory_attention(case: Case) -> Workload:
    """Trajectories over the case's window; their inverse index is built before a backward is timed."""
    q, k, v, d_o = tokens(case, grad=case.direction != "fwd")
    trajectories = zk.chain_links(links(case), window=case.window, backend=case.backend)
    live = trajectories.valid & (trajectories.frames >= 0)[None, :, :, None]
    samples = float(live.sum()) * case.C
    scale = case.shape.D**-0.5
    runs, left_out = _split(peers.trajectory_attention(q, k, v, trajectories))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return zk.trajectory_attention(q, k, v, trajectories, backend=case.backend)

    forwards: dict[str, Call] = {"ours": lambda: ours(q, k, v)}
    if case.direction == "fwd":
        out = torch.empty_like(q)
        forwards["ours_out"] = lambda: zk.trajectory_attention(q, k, v, trajectories, backend=case.backend, out=out)
    forwards |= runs

    tables = (trajectories.positions, trajectories.valid, trajectories.frames, trajectories.grid)
    check = _checker(
        case, 20 * samples, q, k, v, d_o, ours,
        lambda q, k, v: trajectory_attention_reference(q, k, v, *tables, scale)[0],
        lambda q, k, v: testing.eager_trajectory_attention(q, k, v, trajectories, scale)[0],
    )  # fmt: skip
    directed = _directed(case, forwards, (q, k, v), d_o)
    gathered = 8 * samples * q.element_size()  # 4 corners of K and of V
    if case.direction != "fwd":
        trajectories.inverse(case.T)
        directed["ours_index"] = lambda: inverse_index.inverse(*tables, case.T)
        times = {"bwd": 2.0, "step": 3.0}[case.direction]  # the backward gathers K, V, then q, dO
        return Workload(directed, check, times * 20 * samples, times * gathered, left_out=left_out)
    traffic = 4.0 * q.numel() * q.element_size() + 9.0 * live.numel()
    return Workload(directed, check, 20 * samples, gathered, traffic, left_out)


def chain_links(case: Case) -> Workload:
    """Chaining over the case's window."""
    given = links(case)
    fields = (given.forward, given.backward, given.valid_forward, given.valid_backward)

    def eager(*fields: Tensor) -> tuple[Tensor, Tensor]:
        return chain_links_reference(*fields, given.grid, case.window, False, False)

    def chained() -> zk.Trajectories:
        return zk.chain_links(given, window=case.window, backend=case.backend)

    def check() -> None:
        ours = chained()
        positions, valid = eager(fields[0].double(), fields[1].double(), *fields[2:])
        if not torch.equal(ours.valid, valid):
            count = int((ours.valid != valid).sum())
            raise AssertionError(f"{case.name}: validity differs from float64 in {count} of {valid.numel()} slots")
        plain = eager(*fields)[0]
        testing.assert_within_budget(ours.positions, positions, plain, f"{case.name} positions")

    contestants: dict[str, Call] = {
        "ours": chained,
        "eager": lambda: eager(*fields),
    }
    return Workload(contestants, check)


def slr_module(case: Case) -> PlainAttention:
    """Return a seeded spatial self-attention layer whose logits have a standard deviation of about 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        module = PlainAttention(case.C, case.shape.H)
        torch.nn.init.normal_(module.qkv.weight, std=case.C**-0.5)
    return module.to(case.device, DTYPES[case.dtype])


def slr_context(case: Case) -> zk.VideoContext:
    """Return the context of the case's variant; "corrected" corrects from half of the steps on."""
    options = zk.SLROptions(
        frames="previous" if case.variant == "previous" else "neighbors",
        window=WINDOW,
        check="none",
        backend=case.backend,
        correct=zk.CorrectionOptions(enabled=case.variant == "corrected"),
    )
    forward = flow(case)
    return zk.VideoContext(forward, -forward, options=options)


def slr_attention(case: Case) -> Workload:
    """The whole layer, norm to residual, beside the spatial layer it replaces and SLR attention in eager PyTorch."""
    x, d_o = _normal(case, (2, case.T, case.C, *case.shape.grid)).unbind(0)
    module, context = slr_module(case), slr_context(case)
    layer = zk.SLRAttention.from_attention(module, name="layer")
    rows = context.table().long()
    fixed = context.trajectories(case.shape.grid)
    inputs = (x.clone().requires_grad_(case.direction != "fwd"), *module.parameters())
    x = inputs[0]

    short = peers.sdpa_on_concat
    if case.device != "cpu":  # which would keep float64 scores of all frames there

        def short(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
            return cross_frame_attention_reference(q, k, v, rows.int(), case.shape.D**-0.5)[0]

    def corrected() -> Tensor:
        with context.step(1, 2):
            return layer(x, context)

    def attended(module: PlainAttention, x: Tensor, forward: Call) -> list[Tensor]:
        x = x.detach().clone().requires_grad_()
        if case.direction == "fwd":
            with torch.no_grad():
                return [forward(x)]
        out = forward(x)
        return [out.detach(), *torch.autograd.grad(out, (x, *module.parameters()), d_o.to(out.dtype))]

    def check() -> None:
        # Eager PyTorch, in float64 and in the tested dtype, follows the links that ours found.
        trajectories = fixed
        if case.variant == "corrected":
            context.begin_step(1, 2)
            with torch.no_grad():
                tokens = layer.adapter.begin(x)[0][None]
                trajectories = context.corrected("layer", case.shape.grid, tokens)
        wide = copy.deepcopy(module).double()
        got = attended(module, x, lambda x: layer(x, context))
        oracle = attended(wide, x.double(), lambda x: peers.slr_layer(wide, x, rows, trajectories, short))
        plain = attended(module, x, lambda x: peers.slr_layer(module, x, rows, trajectories))
        context.reset()
        names = ("out", "dx", *(f"d {name}" for name, _ in module.named_parameters()))
        for what, value, o, e in zip(names, got, oracle, plain, strict=False):
            testing.assert_within_budget(value, o, e, f"{case.name} {what}", gradient=what != "out")

    forwards: dict[str, Call] = {
        "ours": corrected if case.variant == "corrected" else lambda: layer(x, context),
        "spatial_layer": lambda: module(x),
        "eager_slr": lambda: peers.slr_layer(module, x, rows, fixed),
    }
    left_out = {}
    if case.variant == "corrected":
        del forwards["eager_slr"]
        left_out["eager_slr"] = "it corrects no links"
    counted = None
    if case.direction == "fwd":
        live = float(peers.live_rows(fixed)[1].sum())
        counted = 4.0 * case.C * case.P**2 * int((rows >= 0).sum()) + 8.0 * case.T * case.P * case.C**2
        counted += 20 * live * case.C
    return Workload(_directed(case, forwards, inputs, d_o), check, counted, left_out=left_out)


def _pairs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of adjacent frames, ``[T-1, P, C]`` each, and positions ``[T-1, P, 2]`` of the links."""
    features = _normal(case, (case.T, case.P, case.C))
    return features[:-1], features[1:], links(case).forward[0]


def correspondence_search(case: Case) -> Workload:
    """Search around the sites nearest to the links' ends, forward links of all adjacent frames."""
    f_src, f_dst, positions = _pairs(case)
    grid, radius = case.shape.grid, case.shape.radius
    site = nearest_site(positions, grid)
    centre = torch.stack((site % grid[1], site // grid[1]), -1).to(torch.int32)
    last = torch.tensor((grid[1] - 1, grid[0] - 1), device=centre.device)
    sides = torch.minimum(centre + radius, last) - (centre - radius).clamp(min=0) + 1
    candidates = float(sides.double().prod(-1).sum())
    contestants, left_out = _split(peers.correspondence_search(f_src, f_dst, centre, grid, radius))

    def ours() -> tuple[Tensor, Tensor]:
        return zk.correspondence_search(f_src, f_dst, centre, grid=grid, radius=radius, backend=case.backend)

    def check() -> None:
        site, score = ours()
        wide = f_src.double(), f_dst.double()
        best = correspondence_search_reference(*wide, centre, grid, radius)[1]
        x, y = site % grid[1], site // grid[1]
        if not bool((torch.stack((x, y), -1) - centre).abs().max() <= radius):
            raise AssertionError(f"{case.name}: a site outside its window")
        where = torch.stack((x, y), -1).float()
        own, plain = (link_score_reference(*pair, where, grid) for pair in (wide, (f_src.float(), f_dst.float())))
        testing.assert_within_budget(score, own, plain, f"{case.name} score")
        testing.assert_within_budget(score, best, plain, f"{case.name} best score")

    moved = 2.0 * f_src.numel() * f_src.element_size() + 16.0 * site.numel()
    return Workload({"ours": ours} | contestants, check, 2 * case.C * candidates, None, moved, left_out)


def link_score(case: Case) -> Workload:
    """Score the forward links of all adjacent frames."""
    f_src, f_dst, positions = _pairs(case)
    grid = case.shape.grid
    contestants, left_out = _split(peers.link_score(f_src, f_dst, positions, grid))

    def ours() -> Tensor:
        return zk.link_score(f_src, f_dst, positions, grid=grid, backend=case.backend)

    def check() -> None:
        oracle = link_score_reference(f_src.double(), f_dst.double(), positions, grid)
        plain = link_score_reference(f_src.float(), f_dst.float(), positions, grid)
        testing.assert_within_budget(ours(), oracle, plain, f"{case.name} score")

    moved = 2.0 * f_src.numel() * f_src.element_size() + 12.0 * f_src.shape[0] * case.P
    return Workload({"ours": ours} | contestants, check, 14.0 * f_src.numel(), None, moved, left_out)


BUILD = {
    "cross_frame_attention": cross_frame_attention,
    "trajectory_attention": trajectory_attention,
    "chain_links": chain_links,
    "slr_attention": slr_attention,
    "correspondence_search": correspondence_search,
    "link_score": link_score,
}
