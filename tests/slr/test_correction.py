"""Correction of links: against a loop over tokens written from its definition, and the method's invariants."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zsvr_kernels as zk
from zsvr_kernels.sampling import is_inside, nearest_site, sites

TIE = 1e-5
CLOSE = 1e-6  # decisions closer than this are float32's to take; the loop leaves such tokens out


def some_links(B, T, grid, generator, *, dead=0.25, spread=1.2):
    P = grid[0] * grid[1]
    own = sites(grid)
    links = [own + spread * torch.randn(B, T - 1, P, 2, generator=generator) for _ in range(2)]
    links = [torch.where(torch.rand(x.shape[:-1], generator=generator)[..., None] < 0.3, x.round(), x) for x in links]
    valid = [torch.rand(B, T - 1, P, generator=generator) >= dead for _ in range(2)]
    return zk.Links.from_positions(*links, *valid, grid)


def some_features(B, T, P, generator, C=4):
    """Features with exact repeats, so that ties happen."""
    features = torch.randn(B, T, P, C, generator=generator)
    repeat = torch.rand(B, T, P, generator=generator) < 0.4
    return torch.where(repeat[..., None], features[:, :, :1], features)


# ---- the definition, token by token ----


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    lengths = [max(math.sqrt(sum(x * x for x in v)), 1e-6) for v in (a, b)]
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths[0] / lengths[1]


def sample(f, position, grid):
    Hg, Wg = grid
    x, y = min(max(position[0], 0.0), Wg - 1.0), min(max(position[1], 0.0), Hg - 1.0)
    x0, y0 = math.floor(x), math.floor(y)
    x1, y1 = min(x0 + 1, Wg - 1), min(y0 + 1, Hg - 1)
    fx, fy = x - x0, y - y0
    return (
        (1 - fx) * (1 - fy) * f[y0 * Wg + x0]
        + fx * (1 - fy) * f[y0 * Wg + x1]
        + (1 - fx) * fy * f[y1 * Wg + x0]
        + fx * fy * f[y1 * Wg + x1]
    )


def correct_token(source, target, p, flow, flow_valid, past, grid, options, due):
    """Return link, validity, what is remembered (or None), and whether float32 may decide otherwise."""
    Hg, Wg = grid
    unsure = []

    def exceeds(a, b):
        unsure.append(abs(a - b) < CLOSE)
        return a > b

    def score(position):
        return cosine(source[p], sample(target, position, grid))

    usable = flow_valid and -0.5 <= flow[0] <= Wg - 0.5 and -0.5 <= flow[1] <= Hg - 0.5
    similar = remembered = None
    if due and options.similarity:
        start = past[0] if past is not None and options.search_center == "history" else flow
        cx = min(max(math.floor(start[0] + 0.5), 0), Wg - 1)
        cy = min(max(math.floor(start[1] + 0.5), 0), Hg - 1)
        best = None
        for dy in range(-options.radius, options.radius + 1):
            for dx in range(-options.radius, options.radius + 1):
                x, y = cx + dx, cy + dy
                if 0 <= x < Wg and 0 <= y < Hg:
                    token = target[y * Wg + x]
                    value = cosine(source[p], token)
                    if best is not None and not torch.equal(token, best[2]):
                        unsure.append(abs(value - best[1]) < CLOSE)
                    if best is None or value > best[1]:
                        best = (float(x), float(y)), value, token
        similar = best[:2]
    if past is not None and options.history:
        again = score(past[0]) if options.history_score == "reevaluate" else past[1]
        remembered = past[0], again
    link, valid, kept = flow, flow_valid, None
    if usable:
        kept = flow, score(flow)
        if similar is not None and exceeds(similar[1], kept[1] + options.margin + TIE):
            kept = similar
        if remembered is not None and exceeds(remembered[1], kept[1] + TIE):
            kept = remembered
    elif options.revive_threshold is not None:
        candidate = similar
        if remembered is not None and (candidate is None or exceeds(remembered[1], candidate[1] + TIE)):
            candidate = remembered
        if candidate is not None and exceeds(candidate[1], options.revive_threshold):
            kept = candidate
    if kept is not None:
        link, valid = kept[0], True
    return link, valid, kept if kept is not None else past, any(unsure)


def check_against_the_loop(links, features, history, k, K, options):
    """Compare one step; return its links and history, and how many tokens were compared."""
    new, pending = zk.correct_links(links, features, history, k=k, K=K, options=options, backend="reference")
    again = zk.correct_links(links, features, history, k=k, K=K, options=options, backend="reference")
    first = next((n for n in range(K) if n / K >= options.similarity_start), K)
    if not options.enabled or k < first or not (options.similarity or options.history):
        assert new is links and pending is None
        return new, pending, 0
    for name, x in new.tensors().items():
        assert torch.equal(x, again[0].tensors()[name])
    assert (pending is not None) == options.history
    due = options.similarity and (k - first) % options.search_every == 0
    wide, compared, total = features.double(), 0, 0
    B, pairs, P, _ = links.forward.shape
    for name, b, i, p in itertools.product(("forward", "backward"), range(B), range(pairs), range(P)):
        source, target = (wide[b, i], wide[b, i + 1]) if name == "forward" else (wide[b, i + 1], wide[b, i])
        past = None
        if options.history and history is not None and bool(getattr(history, f"has_{name}")[b, i, p]):
            past = getattr(history, name)[b, i, p].tolist(), float(getattr(history, f"score_{name}")[b, i, p])
        flow = getattr(links, name)[b, i, p].tolist()
        flow_valid = bool(getattr(links, f"valid_{name}")[b, i, p])
        link, valid, kept, is_unsure = correct_token(
            source, target, p, flow, flow_valid, past, links.grid, options, due
        )
        total += 1
        if is_unsure:
            continue
        compared += 1
        where = (name, b, i, p)
        assert getattr(new, name)[b, i, p].tolist() == list(link), where
        assert bool(getattr(new, f"valid_{name}")[b, i, p]) == valid, where
        if pending is not None:
            assert bool(getattr(pending, f"has_{name}")[b, i, p]) == (kept is not None), where
            if kept is not None:
                assert getattr(pending, name)[b, i, p].tolist() == list(kept[0]), where
                assert abs(float(getattr(pending, f"score_{name}")[b, i, p]) - kept[1]) < CLOSE, where
    assert compared >= 0.9 * total
    return new, pending, compared


some_options = st.builds(
    zk.CorrectionOptions,
    similarity=st.booleans(),
    history=st.booleans(),
    radius=st.integers(0, 2),
    similarity_start=st.sampled_from([0.0, 0.3, 0.5]),
    search_every=st.integers(1, 3),
    margin=st.sampled_from([0.0, 0.1]),
    history_score=st.sampled_from(["reevaluate", "stored"]),
    search_center=st.sampled_from(["history", "flow"]),
    revive_threshold=st.sampled_from([None, -0.5, 0.3, 0.8]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(some_options, st.integers(0, 2**31), st.sampled_from([(1, 3, (3, 4)), (2, 2, (2, 3)), (1, 2, (1, 5))]))
def test_steps_follow_the_definition(options, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    B, T, grid = shape
    links = some_links(B, T, grid, generator)
    history, compared = None, 0
    for k in range(1, 5):
        features = some_features(B, T, grid[0] * grid[1], generator)
        _, pending, count = check_against_the_loop(links, features, history, k, 5, options)
        history = pending if pending is not None else history
        compared += count
    assert compared or not (options.similarity or options.history)


@pytest.mark.parametrize("history_score", ["reevaluate", "stored"])
@pytest.mark.parametrize("search_center", ["history", "flow"])
@pytest.mark.parametrize("revive", [None, 0.4])
def test_every_kind_of_link_is_chosen_somewhere(history_score, search_center, revive, generator):
    """The comparison with the loop is worth something only if each branch is taken."""
    options = zk.CorrectionOptions(
        similarity_start=0.0, search_every=2, radius=1, margin=0.02,
        history_score=history_score, search_center=search_center, revive_threshold=revive,
    )  # fmt: skip
    links = some_links(1, 3, (4, 5), generator)
    history = None
    kinds = {"flow": 0, "history": 0, "search": 0, "revived": 0, "lost": 0}
    for k in range(4):
        features = some_features(1, 3, 20, generator, C=3)
        new, pending, _ = check_against_the_loop(links, features, history, k, 4, options)
        usable = links.valid_forward & is_inside(links.forward, links.grid)
        stays = (new.forward == links.forward).all(-1)
        kinds["flow"] += int((usable & stays).sum())
        if history is not None:
            recalled = history.has_forward & (new.forward == history.forward).all(-1) & ~stays
            kinds["history"] += int((usable & recalled).sum())
        kinds["search"] += int((usable & ~stays).sum())
        kinds["revived"] += int((~usable & ~stays & new.valid_forward).sum())
        kinds["lost"] += int((~usable & stays & ~new.valid_forward).sum())
        history = pending
    assert all(kinds[name] > 0 for name in ("flow", "history", "search", "lost")), kinds
    assert (kinds["revived"] > 0) == (revive is not None), kinds


# ---- invariants ----


@pytest.mark.parametrize("every", [1, 2])
def test_the_current_score_never_gets_worse(every, generator, search):
    options = zk.CorrectionOptions(similarity_start=0.0, search_every=every)
    links = some_links(2, 4, (5, 6), generator)
    history, gains = None, 0.0
    for k in range(4):
        features = some_features(2, 4, 30, generator, C=8)
        new, history = zk.correct_links(links, features, history, k=k, K=4, options=options)
        pairs = [x.flatten(0, 1) for x in (features[:, :-1], features[:, 1:])]
        for name, (source, target) in (("forward", pairs), ("backward", pairs[::-1])):
            before, after = (
                zk.link_score(source, target, getattr(x, name).flatten(0, 1), grid=(5, 6)) for x in (links, new)
            )
            usable = getattr(links, f"valid_{name}") & is_inside(getattr(links, name), (5, 6))
            change = (after - before).unflatten(0, (2, 3))
            assert float(change[usable].min()) >= -1e-6
            assert not bool(change[~usable].any())
            gains += float(change.sum())
    assert gains > 1


def test_an_occluded_or_outgoing_link_is_never_revived_by_default(generator, search):
    links = some_links(1, 3, (4, 5), generator, dead=0.5, spread=3.0)
    history = None
    for k in range(3):
        features = some_features(1, 3, 20, generator)
        new, history = zk.correct_links(
            links, features, history, k=k, K=3, options=zk.CorrectionOptions(similarity_start=0.0)
        )
        for name in ("forward", "backward"):
            valid, position = getattr(links, f"valid_{name}"), getattr(links, name)
            assert torch.equal(getattr(new, f"valid_{name}"), valid)
            gone = ~valid | ~is_inside(position, (4, 5))
            outgoing = valid & ~is_inside(position, (4, 5))
            assert bool(outgoing.any()) and bool((~valid).any())
            assert torch.equal(getattr(new, name)[gone], position[gone])
            assert not bool(getattr(history, f"has_{name}")[gone].any())


def test_before_admission_and_switched_off_links_are_the_flows(generator, search):
    links = some_links(1, 3, (4, 5), generator)
    features = some_features(1, 3, 20, generator)
    for options, k in (
        (zk.CorrectionOptions(), 4),
        (zk.CorrectionOptions(enabled=False), 9),
        (zk.CorrectionOptions(similarity=False, history=False), 9),
        (zk.CorrectionOptions(similarity_start=1.0), 9),
    ):
        assert zk.correct_links(links, features, k=k, K=10, options=options) == (links, None)
    changed, history = zk.correct_links(links, features, k=5, K=10)
    assert not torch.equal(changed.forward, links.forward) and history is not None
    _, none = zk.correct_links(links, features, k=5, K=10, options=zk.CorrectionOptions(history=False))
    assert none is None


def run(links, clip, options, K):
    """Correct through K steps; return the links of every step."""
    history, results = None, []
    for k, features in enumerate(clip):
        new, pending = zk.correct_links(links, features, history, k=k, K=K, options=options)
        history = history if pending is None else pending
        results.append(new)
    return results


def differs(a, b):
    return any(not torch.equal(x, y.tensors()[n]) for p, y in zip(a, b, strict=True) for n, x in p.tensors().items())


def test_history_is_inert_around_the_flow_and_active_otherwise(generator, search):
    links = some_links(1, 3, (6, 6), generator, dead=0.1)
    clip = [some_features(1, 3, 36, generator, C=8) for _ in range(5)]
    inert = zk.CorrectionOptions(similarity_start=0.0, radius=1, search_center="flow")
    without = dataclasses.replace(inert, history=False)
    assert not differs(run(links, clip, inert, 5), run(links, clip, without, 5))
    for change in ({"search_center": "history"}, {"history_score": "stored"}, {"search_every": 2}, {"margin": 0.3}):
        active = dataclasses.replace(inert, **change)
        off = dataclasses.replace(active, history=False)
        assert differs(run(links, clip, active, 5), run(links, clip, off, 5)), change


def texture(T, grid, shift, generator, C=16):
    """A clip that moves by ``shift`` sites from frame to frame over an endless texture."""
    Hg, Wg = grid
    world = torch.randn(Hg + 40, Wg + 40, C, generator=generator)
    frames = [
        world[20 - i * shift[1] : 20 - i * shift[1] + Hg, 20 - i * shift[0] : 20 - i * shift[0] + Wg] for i in range(T)
    ]
    return torch.stack(frames).flatten(1, 2)[None]


@pytest.mark.parametrize("shift", [(2, -1), (-1, 2)])
def test_a_moving_texture_is_found(shift, generator, search):
    grid = (9, 10)
    features = texture(3, grid, shift, generator)
    still = zk.Links.from_flow(*[torch.zeros(1, 2, 2, 9, 10)] * 2, grid=grid)
    new, _ = zk.correct_links(still, features, options=zk.CorrectionOptions(similarity_start=0.0))
    own = sites(grid)
    for name, sign in (("forward", 1), ("backward", -1)):
        wanted = own + sign * torch.tensor(shift, dtype=torch.float32)
        visible = (wanted >= 0).all(-1) & (wanted[:, 0] <= 9) & (wanted[:, 1] <= 8)
        assert int(visible.sum()) > 40
        assert torch.equal(getattr(new, name)[0, :, visible], wanted[visible].expand(2, -1, -1))


def test_history_lets_links_move_further_than_the_radius(generator, search):
    """The texture moves by 4 sites; a window of 1 follows similarity uphill only if it moves along."""
    grid = (1, 16)
    ramp = torch.arange(16.0) / 16
    frame = torch.stack((ramp.cos(), ramp.sin()), -1)  # the cosine falls with the distance
    moved = torch.stack(((ramp - 0.25).cos(), (ramp - 0.25).sin()), -1)
    features = torch.stack((frame, moved))[None]
    still = zk.Links.from_flow(*[torch.zeros(1, 1, 2, 1, 16)] * 2, grid=grid)
    reached = {}
    for center in ("history", "flow"):
        options = zk.CorrectionOptions(similarity_start=0.0, radius=1, search_center=center)
        reached[center] = [
            float((new.forward - still.forward)[0, 0, 4, 0]) for new in run(still, [features] * 6, options, 6)
        ]
    assert reached == {"history": [1, 2, 3, 4, 4, 4], "flow": [1] * 6}


def test_a_stored_score_keeps_a_link_that_features_no_longer_show(generator, search):
    grid = (1, 4)
    still = zk.Links.from_flow(*[torch.zeros(1, 1, 2, 1, 4)] * 2, grid=grid)
    a, b = torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]
    swapped = torch.stack((a, b))[None]
    later = torch.stack((a, a + 0.3))[None]
    ends = {}
    for score in ("reevaluate", "stored"):
        options = zk.CorrectionOptions(similarity_start=0.0, radius=1, history_score=score, search_center="flow")
        ends[score] = run(still, [swapped, later], options, 2)[1].forward[0, 0, :, 0].tolist()
    assert ends == {"reevaluate": [0, 1, 2, 3], "stored": [1, 0, 2, 3]}


def test_ties_keep_the_flow_then_the_search(generator, search):
    grid = (2, 3)
    links = some_links(1, 2, grid, generator, dead=0.0, spread=0.3)
    same = torch.ones(1, 2, 6, 4)
    options = zk.CorrectionOptions(similarity_start=0.0, revive_threshold=0.5)
    filled = zk.LinkHistory(
        *[torch.full((1, 1, 6, 2), 1.25)] * 2, *[torch.full((1, 1, 6), 0.1)] * 2, *[torch.ones(1, 1, 6).bool()] * 2
    )
    usable = is_inside(links.forward, grid)
    new, _ = zk.correct_links(links, same, filled, options=options)
    assert bool(usable.any()) and torch.equal(new.forward[usable], links.forward[usable])
    dead = zk.Links.from_positions(links.forward, links.backward, *[torch.zeros(1, 1, 6, dtype=torch.bool)] * 2, grid)
    new, _ = zk.correct_links(dead, same, filled, options=options)
    assert torch.equal(new.forward[0, 0], torch.zeros(6, 2))  # lowest site of the window around the remembered (1, 1)
    assert bool(new.valid_forward.all())
    late = dataclasses.replace(options, search_every=2)
    new, _ = zk.correct_links(dead, same, filled, k=1, K=2, options=late)
    assert torch.equal(new.forward[0, 0], torch.full((6, 2), 1.25)) and bool(new.valid_forward.all())


def test_less_than_the_tie_is_no_gain(generator, search):
    """A gain of 5e-6 keeps the flow, one of 2e-5 does not."""
    for gain, target in ((5e-6, 0.0), (2e-5, 1.0)):
        angle = math.acos(1 - gain)
        tokens = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)], [-1.0, 0.0]], dtype=torch.float64)
        source = tokens[[1, 1, 1]]
        features = torch.stack((source, tokens))[None].float()
        still = zk.Links.from_flow(*[torch.zeros(1, 1, 2, 1, 3)] * 2, grid=(1, 3))
        new, _ = zk.correct_links(still, features, options=zk.CorrectionOptions(similarity_start=0.0, radius=1))
        assert float(new.forward[0, 0, 0, 0]) == target


@pytest.mark.parametrize("K", [1, 3, 7, 10, 20, 49, 50, 100, 999, 1000])
def test_the_first_admitted_step_is_exact(K):
    starts = [0.0, 0.1, 0.29, 0.3, 0.5, 0.55, 0.57, 0.58, 0.7, 0.9, 1 / 3, 2 / 3, 1.0, 5e-324, 1 - 2**-53]
    starts += [k / K for k in range(K)]
    starts += [math.nextafter(k / K, 2) for k in range(K)] + [math.nextafter(k / K, -1) for k in range(1, K)]
    for start in starts:
        options = zk.CorrectionOptions(similarity_start=start)
        expected = next((k for k in range(K) if k / K >= start), K)
        assert options.first_admitted(K) == expected, (start, K)
        for k in {0, max(0, expected - 1), min(expected, K - 1), K - 1}:
            assert options.is_admitted(k, K) == (k >= expected)


def test_other_numbers_become_pythons():
    numpy = pytest.importorskip("numpy")
    options = zk.CorrectionOptions(
        radius=numpy.int64(3), similarity_start=Fraction(1, 4), margin=numpy.float32(0.5), revive_threshold=0
    )
    kinds = [type(getattr(options, n)) for n in ("radius", "similarity_start", "margin", "revive_threshold")]
    assert kinds == [int, float, float, float]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_features_of_other_dtypes_and_layouts(dtype, generator, search):
    links = some_links(2, 3, (3, 4), generator)
    features = torch.randn(2, 3, 12, 16, generator=generator).to(dtype).requires_grad_()
    options = zk.CorrectionOptions(similarity_start=0.0)
    expected, remembered = zk.correct_links(links, features.float(), options=options)
    strided = features.detach().mT.contiguous().mT
    for given_features in (features, strided):
        new, pending = zk.correct_links(links, given_features, options=options)
        for name, x in new.tensors().items():
            assert torch.equal(x, expected.tensors()[name]) and not x.requires_grad
        assert pending.score_forward.dtype == torch.float32 and not pending.score_forward.requires_grad
        assert torch.allclose(pending.score_forward, remembered.score_forward, rtol=0, atol=1e-6)


def test_one_frame_and_features_that_are_no_numbers(generator, search):
    single = zk.Links.from_flow(*[torch.zeros(2, 0, 2, 8, 8)] * 2, grid=(2, 2))
    options = zk.CorrectionOptions(similarity_start=0.0)
    assert zk.correct_links(single, torch.ones(2, 1, 4, 3), options=options) == (single, None)
    links = some_links(1, 2, (2, 3), generator)
    broken = torch.full((1, 2, 6, 3), torch.nan)
    new, history = zk.correct_links(links, broken, options=options)
    assert torch.equal(new.forward, links.forward) and torch.equal(new.valid_forward, links.valid_forward)
    healed, _ = zk.correct_links(links, some_features(1, 2, 6, generator, C=3), history, options=options)
    assert bool(torch.isfinite(healed.forward).all())
    assert nearest_site(healed.forward, (2, 3)).max() <= 5


def test_errors(generator):
    links = some_links(1, 3, (2, 3), generator)
    features = torch.ones(1, 3, 6, 4)
    _, history = zk.correct_links(
        links, features, options=zk.CorrectionOptions(similarity_start=0.0), backend="reference"
    )
    cut = dataclasses.replace(history, has_backward=history.has_backward[:, :1])
    cases = [
        (TypeError, "links must be zsvr_kernels.Links", ("links", features), {}),
        (TypeError, "features must be a torch.Tensor", (links, None), {}),
        (ValueError, "features must have 4 axes", (links, features[0]), {}),
        (ValueError, "features must have shape", (links, features[:, :2]), {}),
        (TypeError, "features must be", (links, features.int()), {}),
        (ValueError, "features is on meta", (links, features.to("meta")), {}),
        (ValueError, "k must be within 0..K-1 = 0..3, got 4", (links, features), {"k": 4, "K": 4}),
        (ValueError, "k must be at least 0", (links, features), {"k": -1, "K": 4}),
        (ValueError, "K must be at least 1", (links, features), {"K": 0}),
        (TypeError, "k must be an int", (links, features), {"k": 0.5}),
        (TypeError, "options must be zsvr_kernels.CorrectionOptions", (links, features), {"options": zk.SLROptions()}),
        (TypeError, "history must be zsvr_kernels.LinkHistory", (links, features, {"forward": 1}), {}),
        (ValueError, "history.has_backward must have shape", (links, features, cut), {}),
        (ValueError, "backend must be one of", (links, features), {"backend": "fast", "k": 1, "K": 2}),
    ]
    for error, message, arguments, keywords in cases:
        with pytest.raises(error, match=message):
            zk.correct_links(*arguments, **keywords)
    wrong = dataclasses.replace(history, score_forward=history.score_forward.double())
    with pytest.raises(TypeError, match=r"history.score_forward must be float32"):
        zk.correct_links(links, features, wrong)
    broken = dataclasses.replace(links, forward=links.forward[..., :1])
    with pytest.raises(ValueError, match="forward must have shape"):
        zk.correct_links(broken, features)


def test_where_nothing_is_stored_the_history_is_not_read(generator, search):
    links = some_links(1, 3, (3, 4), generator)
    features = some_features(1, 3, 12, generator)
    options = zk.CorrectionOptions(similarity_start=0.0, radius=1, history_score="stored", revive_threshold=-0.9)
    results = []
    for position, score in ((0.0, -1.0), (2.0, 1.0)):
        empty = zk.LinkHistory(
            *[torch.full((1, 2, 12, 2), position)] * 2,
            *[torch.full((1, 2, 12), score)] * 2,
            *[torch.zeros(1, 2, 12).bool()] * 2,
        )
        results.append(zk.correct_links(links, features, empty, options=options)[0].tensors())
    results.append(zk.correct_links(links, features, options=options)[0].tensors())
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


def test_history_describes_itself(generator, search):
    links = some_links(1, 3, (2, 3), generator, dead=0.0, spread=0.1)
    _, history = zk.correct_links(links, torch.ones(1, 3, 6, 4), options=zk.CorrectionOptions(similarity_start=0))
    assert repr(history) == "LinkHistory(B=1, T=3, P=6, stored=100%, 100%)"
    assert sum(x.numel() * x.element_size() for x in history.tensors().values()) == 26 * 2 * 6
    assert all(torch.equal(x, getattr(history, n)) for n, x in history.to("cpu").tensors().items())
