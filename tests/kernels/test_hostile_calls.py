"""Calls that reach past the public functions' types: fields, strides, memory and registered ops, all in this process.

A call is either refused with an error that says something, or it gives what plain copies of its arguments give.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zsvr_kernels as zk
from zsvr_kernels import _native, testing
from zsvr_kernels.sampling import sites

pytestmark = pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")

ERRORS = (TypeError, ValueError, RuntimeError)
GRID, T, L = (3, 4), 3, 2
P = GRID[0] * GRID[1]
WILD = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1.9e19, 2.0**31, -(2.0**63), -0.0, 1e-40, 0.5)


def spread(x):
    """The same values with other strides: every second element along every axis of a larger tensor."""
    larger = x.new_zeros([2 * n for n in x.shape])
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def emptied(x):
    """A tensor whose memory was taken away; torch's own operations follow its null pointer."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


DISTORTIONS = {
    "half": torch.Tensor.half,
    "double": torch.Tensor.double,
    "int64": torch.Tensor.long,
    "int32": torch.Tensor.int,
    "bool": torch.Tensor.bool,
    "complex": lambda x: x.to(torch.complex64),
    "first axis short": lambda x: x[:1] if len(x) > 1 else x[:0],
    "first axis long": lambda x: torch.cat((x, x, x)),
    "second axis short": lambda x: x[:, :1] if x.dim() > 1 else x[1:],
    "second axis empty": lambda x: x[:, :0] if x.dim() > 1 else x[:0],
    "last axis short": lambda x: x[..., :-1],
    "last axis long": lambda x: torch.cat((x, x), -1),
    "one axis more": lambda x: x[None],
    "one axis less": lambda x: x[0],
    "scalar": lambda x: x.flatten()[0],
    "spread": spread,
    "reversed strides": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "expanded": lambda x: x[:1].expand(x.shape),
    "other device": lambda x: x.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "huge values": lambda x: torch.full_like(x, True if x.dtype == torch.bool else 2**31 - 1),
    "negative values": lambda x: torch.full_like(x, True if x.dtype == torch.bool else -(2**31)),
    "not a number": lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x - x - (x == x).to(x.dtype),
    "nothing": lambda x: None,
    "list": lambda x: x.tolist(),
}


def distorted(x, name):
    """The distorted tensor, or None where the distortion does not exist for it."""
    try:
        return DISTORTIONS[name](x)
    except RuntimeError:
        return None


def plain(x):
    strided = isinstance(x, torch.Tensor) and x.layout == torch.strided
    return x.clone(memory_format=torch.contiguous_format) if strided else x


def outcome(call):
    """What a call returned, as a tuple of tensors, or the error it raised."""
    try:
        result = call()
    except ERRORS as error:
        assert len(str(error)) > 15
        return error
    return result if isinstance(result, tuple) else (result,)


def assert_same(got, expected):
    assert isinstance(got, tuple) == isinstance(expected, tuple), (got, expected)
    if isinstance(got, tuple) and all(x.device.type == "cpu" for x in got):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@functools.cache
def arguments():
    """Good arguments of every registered op."""
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, T, P, 2, 16, generator=g).unbind(0)
    frames = zk.neighbors(T)
    t = testing.random_trajectories(2, T, T, L, GRID, g)
    where = (t.positions, t.valid, t.frames)
    o, lse = torch.ops.zsvr.cross_frame_attention_fwd(q, k, v, frames, 0.25, "cpu")
    links = sites(GRID) + torch.randn(2, 1, T - 1, P, 2, generator=g)
    valid = torch.rand(2, 1, T - 1, P, generator=g) > 0.2
    three, four = [True] * 3, [True] * 4
    f_src, f_dst = torch.randn(2, 2, P, 20, generator=g)
    centre = torch.randint(-1, 5, (2, P, 2), generator=g, dtype=torch.int32)
    return {
        "cross_frame_attention_fwd": (q, k, v, frames, 0.25, "cpu"),
        "cross_frame_attention_out": (q, k, v, frames, 0.25, "cpu", torch.zeros_like(q)),
        "cross_frame_attention_bwd": (o, lse, q, k, v, o, lse, frames, 0.25, three, "cpu"),
        "cross_frame_attention_bwd_add": (
            o, q, k, v, o, lse, frames, 0.25, "cpu", torch.zeros_like(q), torch.zeros_like(k),
        ),
        "trajectory_attention_fwd": (q, k, v, *where, *GRID, 0.25, "cpu"),
        "trajectory_attention_out": (q, k, v, *where, *GRID, 0.25, "cpu", torch.zeros_like(q)),
        "trajectory_attention_bwd": (o, lse, q, k, v, lse, *where, *t.inverse(T), *GRID, 0.25, four, "cpu"),
        "chain_links": (*links, *valid, *GRID, 1, False, False, "cpu"),
        "correspondence_search": (f_src, f_dst, centre, *GRID, 2, "cpu"),
        "link_score": (f_src, f_dst, links[:, 0, 0], *GRID, "cpu"),
    }  # fmt: skip


def registered_ops():
    names = {str(op).split(".")[0] for op in torch._C._dispatch_get_all_op_names() if op.startswith("zsvr::")}
    return sorted(name.removeprefix("zsvr::") for name in names)


def test_every_registered_op_is_tried():
    assert registered_ops() == sorted(arguments())


@pytest.mark.parametrize("name", sorted(arguments()) if _native.is_available() else [])
def test_registered_ops_refuse_what_they_cannot_follow(name):
    op = getattr(torch.ops.zsvr, name)
    good = arguments()[name]
    refused = 0
    for n, x in enumerate(good):
        if isinstance(x, torch.Tensor):
            others = [y for label in DISTORTIONS if (y := distorted(x, label)) is not None] + [emptied(x)]
        elif isinstance(x, str):
            others = ["", "cuda", "reference", None]
        elif isinstance(x, list):
            others = [[], x[:1], x * 2, [False] * len(x), None]
        else:
            others = [-1, 0, 2**31, 2**62, None, "x", float("nan")]
        for other in others:
            call = [*map(plain, good[:n]), other, *map(plain, good[n + 1 :])]
            got = outcome(lambda call=call: op(*call))
            if isinstance(got, tuple):
                assert_same(got, outcome(lambda call=call: op(*map(plain, call))))
            refused += isinstance(got, Exception)
    assert refused > 10 * sum(isinstance(x, torch.Tensor) for x in good)


def test_an_inverse_index_that_leads_astray_is_refused():
    good = arguments()["trajectory_attention_bwd"]
    at = {name: 9 + n for n, name in enumerate(("offsets", "samples", "weights"))}
    for name, change in {
        "offsets": lambda x: x + 1,
        "offsets ": lambda x: x.flip(0),
        "offsets  ": lambda x: torch.where(torch.arange(len(x)) == 5, 10**12, x),
        "samples": lambda x: x + 1,
        "samples ": lambda x: x - 1,
        "samples  ": lambda x: x + T * L * P,
    }.items():
        call = list(good)
        call[at[name.strip()]] = change(good[at[name.strip()]])
        with pytest.raises(ValueError, match=name.strip()):
            torch.ops.zsvr.trajectory_attention_bwd(*call)


LABELS = st.sampled_from(sorted(DISTORTIONS))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(data=st.data())
def test_hostile_trajectories(data):
    names = ("q", "k", "v", "positions", "valid", "frames")
    good = dict(zip(names, arguments()["trajectory_attention_fwd"][:6], strict=True))
    call = {name: plain(x) for name, x in good.items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(call)), min_size=1, max_size=2, unique=True)):
        call[name] = distorted(good[name], data.draw(LABELS))
    grid = data.draw(st.sampled_from([GRID, GRID, GRID, (4, 3), (12, 1), (3000, 3000), (2, 6.0), (-3, -4), None]))

    def attend(backend, copy):
        q, k, v, *fields = (copy(x) for x in call.values())
        return zk.trajectory_attention(q, k, v, zk.Trajectories(*fields, grid), return_lse=True, backend=backend)

    got = outcome(lambda: attend("cpu", lambda x: x))
    expected = outcome(lambda: attend("reference", plain))
    if isinstance(got, tuple):
        assert_same(got, outcome(lambda: attend("cpu", plain)))
        assert isinstance(expected, tuple), expected
        # Positions that are not finite are out of contract here: the kernel clamps them, the reference need not.
        if all(x.abs().max() < 1e4 for x in call.values() if x.is_floating_point()):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5, equal_nan=True)
    elif isinstance(expected, tuple) and expected[0].device.type == "cpu":
        assert any(word in str(got) for word in ("backend", "dense (stride 1)"))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(data=st.data())
def test_hostile_links(data):
    names = ("forward", "backward", "valid_forward", "valid_backward")
    good = dict(zip(names, arguments()["chain_links"][:4], strict=True))
    links = zk.Links(*good.values(), GRID)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        links = dataclasses.replace(links, **{name: distorted(good[name], data.draw(LABELS))})
    for name in data.draw(st.lists(st.sampled_from(names[:2]), max_size=1)):
        values = torch.tensor(data.draw(st.lists(st.sampled_from(WILD), min_size=6, max_size=6)))
        links = dataclasses.replace(links, **{name: values.repeat(good[name].numel() // 6).reshape(good[name].shape)})
    grid = data.draw(st.sampled_from([GRID, GRID, GRID, (4, 3), (3000, 3000), (2**40, 1), (3,), None]))
    links = dataclasses.replace(links, grid=grid)
    copied = zk.Links(*(plain(getattr(links, name)) for name in names), grid)
    options = {
        "window": data.draw(st.sampled_from([None, 0, 1, 5, 2**62, -1, 0.5])),
        "rounding": data.draw(st.sampled_from(["bilinear", "nearest"])),
        "link_rule": data.draw(st.sampled_from(["nearest", "corners"])),
    }

    def chain(links, backend):
        t = zk.chain_links(links, **options, backend=backend)
        return t.positions, t.valid, t.frames

    got = outcome(lambda: chain(links, "cpu"))
    if isinstance(got, tuple):
        assert_same(got, outcome(lambda: chain(copied, "cpu")))
        if torch.isfinite(links.forward).all() and torch.isfinite(links.backward).all():
            assert_same(got, outcome(lambda: chain(copied, "reference")))
        assert torch.isfinite(got[0]).all()


@settings(deadline=None, max_examples=300, derandomize=True)
@given(data=st.data())
def test_hostile_features(data):
    f_src, f_dst, centre = arguments()["correspondence_search"][:3]
    call = {"f_src": f_src, "f_dst": f_dst, "centre": centre, "positions": arguments()["link_score"][2]}
    for name in data.draw(st.lists(st.sampled_from(sorted(call)), max_size=2, unique=True)):
        call[name] = distorted(call[name], data.draw(LABELS))
    if data.draw(st.booleans()):
        values = torch.tensor(data.draw(st.lists(st.sampled_from(WILD), min_size=6, max_size=6)))
        name = data.draw(st.sampled_from(["f_src", "f_dst", "positions"]))
        x = arguments()["correspondence_search"][0] if name != "positions" else arguments()["link_score"][2]
        call[name] = values.repeat(x.numel() // 6 + 1)[: x.numel()].reshape(x.shape)
    radius = data.draw(st.sampled_from([0, 1, 2, 5, 65535, 65536, -1, 2.0, None]))
    grid = data.draw(st.sampled_from([GRID, GRID, GRID, (4, 3), (12, 1), (3000, 3000), (2, 6.0), (-3, -4), None]))

    def search(backend, copy):
        f_src, f_dst, centre = (copy(call[name]) for name in ("f_src", "f_dst", "centre"))
        return zk.correspondence_search(f_src, f_dst, centre, grid=grid, radius=radius, backend=backend)

    def score(backend, copy):
        f_src, f_dst, positions = (copy(call[name]) for name in ("f_src", "f_dst", "positions"))
        return zk.link_score(f_src, f_dst, positions, grid=grid, backend=backend)

    for function in (search, score):
        got = outcome(functools.partial(function, "cpu", copy=lambda given: given))
        expected = outcome(functools.partial(function, "reference", copy=plain))
        if not isinstance(got, tuple):
            refused = isinstance(expected, Exception) or expected[0].device.type != "cpu"
            assert refused or any(word in str(got) for word in ("backend", "dense (stride 1)"))
            continue
        assert_same(got, outcome(functools.partial(function, "cpu", copy=plain)))
        assert isinstance(expected, tuple), expected
        if all(x.abs().max() < 1e4 for x in call.values() if isinstance(x, torch.Tensor) and x.is_floating_point()):
            torch.testing.assert_close(got[-1], expected[-1], atol=2e-5, rtol=0)
        if function is search:
            assert bool(((got[0] >= 0) & (got[0] < P)).all())


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_hostile_flow(data):
    sizes = [data.draw(st.integers(low, high)) for low, high in ((0, 2), (0, 2), (1, 9), (1, 9))]
    values = torch.tensor(data.draw(st.lists(st.sampled_from((*WILD, 0.0, 1.0, -2.5)), min_size=8, max_size=8)))
    shape = (*sizes[:2], 2, *sizes[2:])
    flows = {}
    for name in ("flow_forward", "flow_backward"):
        count = int(torch.tensor(shape).prod())
        flow = values.repeat(count // 8 + 1)[:count].reshape(shape)
        if data.draw(st.sampled_from([False, False, True])):
            flow = distorted(flow, data.draw(LABELS)) if count else flow
        flows[name] = flow
    grid = data.draw(st.tuples(st.integers(0, 12), st.integers(1, 12)))
    options = {
        "check": data.draw(st.sampled_from(["U", "S", "none"])),
        "resize": data.draw(st.sampled_from(["area", "antialias", "nearest"])),
        "occ_pool": data.draw(st.sampled_from(["max", "mean"])),
        "alpha": data.draw(st.sampled_from([None, 0.0, 0.5, -1.0, float("nan"), "1"])),
        "motion_boundary": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        mask = torch.zeros(sizes[0], sizes[1], *sizes[2:], dtype=torch.bool)
        options["occ_forward"] = options["occ_backward"] = mask if 0 in sizes else distorted(mask, data.draw(LABELS))
    results = []
    for copy in (lambda x: x, plain):

        def build(copy=copy):
            return zk.Links.from_flow(*(copy(x) for x in flows.values()), grid=grid, **options)

        links = outcome(build)
        results.append(links)
        if isinstance(links, tuple) and links[0].forward.device.type == "cpu":
            links = links[0]
            assert torch.isfinite(links.forward).all() and torch.isfinite(links.backward).all()
            zk.chain_links(links, backend="cpu") if links.forward.shape[0] else None
    assert isinstance(results[0], tuple) <= isinstance(results[1], tuple)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_hostile_outputs(data):
    q, k, v, positions, valid, frames = map(plain, arguments()["trajectory_attention_fwd"][:6])
    trajectories = zk.Trajectories(positions, valid, frames, GRID)
    function, extra = data.draw(
        st.sampled_from([(zk.cross_frame_attention, zk.neighbors(T)), (zk.trajectory_attention, trajectories)])
    )
    backend = data.draw(st.sampled_from(["cpu", "sdpa", "reference"] if extra is not trajectories else ["cpu"]))
    expected = function(q, k, v, extra, backend=backend)
    before = [x.clone() for x in (q, k, v)]
    shared = torch.zeros(2 * q.numel())
    out = data.draw(
        st.sampled_from([
            q, k, v, q.view(-1).view(q.shape), k.flip(0), positions, shared[: q.numel()].view(q.shape),
            shared[1 : q.numel() + 1].view(q.shape), shared[::2].view(q.shape), spread(q), q.mT.contiguous().mT,
            torch.zeros(q.shape).as_strided(q.shape, (0, *q.stride()[1:])),
            *(y for label in DISTORTIONS if (y := distorted(torch.zeros_like(q), label)) is not None),
        ])
    )  # fmt: skip
    got = outcome(lambda: function(q, k, v, extra, backend=backend, out=out))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))
    if isinstance(got, tuple):
        assert got[0] is out and torch.equal(out, expected)


def test_outputs_that_share_memory_with_an_input_are_refused():
    q, k, v, *fields = map(plain, arguments()["trajectory_attention_fwd"][:6])
    both = torch.zeros(2 * q.numel())
    first, second = both[: q.numel()].view(q.shape), both[q.numel() :].view(q.shape)
    shifted = both[1 : q.numel() + 1].view(q.shape)
    for function, extra in (
        (zk.cross_frame_attention, zk.neighbors(T)),
        (zk.trajectory_attention, zk.Trajectories(*fields, GRID)),
    ):
        for n, name in enumerate("qkv"):
            inputs = [q, k, v]
            inputs[n] = first
            for out in (first, shifted):
                with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
                    function(*inputs, extra, out=out)
            assert function(*inputs, extra, out=second) is second


def test_a_default_device_without_memory_is_no_trap():
    q, k, v, *fields = arguments()["trajectory_attention_fwd"][:6]
    trajectories = zk.Trajectories(*fields, GRID)
    flow, frames = torch.ones(1, 2, 2, 8, 9), zk.neighbors(T)

    def everything():
        links = zk.Links.from_flow(flow, -flow, grid=GRID)
        chained = [zk.chain_links(links, window=w, backend=b) for w in (None, 1) for b in ("cpu", "reference")]
        fresh = zk.Trajectories(*fields, GRID)
        leaf = k.clone().requires_grad_()
        out = zk.trajectory_attention(q, leaf, v, fresh, backend="cpu")
        out = out + zk.cross_frame_attention(q, leaf, v, frames, backend="cpu")
        across = [zk.cross_frame_attention(q, k, v, frames, backend=b) for b in ("sdpa", "reference")]
        gradient = torch.autograd.grad(out, leaf, torch.ones_like(out))[0]
        tables = [x for t in chained for x in (t.positions, t.valid, t.frames)]
        f_src, f_dst, centre = arguments()["correspondence_search"][:3]
        for b in ("cpu", "reference"):
            site, score = zk.correspondence_search(f_src, f_dst, centre, grid=GRID, backend=b)
            where = torch.stack((site % 4, site // 4), -1).float()
            tables += [site, score, zk.link_score(f_src, f_dst, where, grid=GRID, backend=b)]
        return [out.detach(), gradient, *across, *trajectories.inverse(T), *fresh.inverse(T), *tables]

    expected = everything()
    torch.set_default_device("meta")
    try:
        got = everything()
    finally:
        torch.set_default_device(None)
    assert all(x.device.type == "cpu" and torch.equal(x, y) for x, y in zip(got, expected, strict=True))
