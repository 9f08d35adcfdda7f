"""What a GPU demands of its callers: graphs, streams, devices, no hidden waiting, the same bits every time."""

from __future__ import annotations

import calls
import pytest
import torch

import zsvr_kernels as zk

attentions = pytest.mark.parametrize("name", calls.ATTENTIONS)


@pytest.fixture
def half(cuda) -> torch.dtype:
    return torch.bfloat16


@attentions
def test_a_graph_replays_what_eager_mode_computes(name, cuda, half):
    attention, inputs = calls.case(name, cuda, half)
    weight = calls.weights(inputs[0])[0]
    static = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls.step(attention, static, weight)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = calls.step(attention, static, weight)
    for seed in range(2):  # new values in the same memory
        for target, x in zip(static, inputs, strict=True):
            target.copy_(x.roll(seed, 1))
        graph.replay()
        torch.cuda.synchronize()
        expected = calls.step(attention, [x.clone() for x in static], weight)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_support_operators_are_captured(cuda):
    grid = (12, 10)
    links = calls.clip(cuda, 5, grid)
    features = calls.tokens(cuda, torch.float16, (2, 120, 64), 1)[0]
    centre = torch.randint(0, 10, (1, 120, 2), dtype=torch.int32, device=cuda)

    def call():
        t = zk.chain_links(links, window=2, backend="triton")
        search = {"grid": grid, "backend": "triton"}
        found = zk.correspondence_search(features[:1], features[1:], centre, radius=2, **search)
        return [t.positions, t.valid, *found, zk.link_score(features[:1], features[1:], links.forward[0, :1], **search)]

    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@attentions
def test_work_stays_on_the_current_stream(name, cuda, half):
    attention, inputs = calls.case(name, cuda, half)
    weight = calls.weights(inputs[0])[0]
    expected = calls.step(attention, inputs, weight)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = [torch.full_like(x, torch.nan) for x in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what does not wait for this stream reads NaN
        for target, x in zip(late, inputs, strict=True):
            target.copy_(x)
        got = calls.step(attention, late, weight)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@attentions
def test_a_device_that_is_not_current(name, cuda, half):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", (cuda.index + 1) % torch.cuda.device_count())
    results = []
    for device in (cuda, other):
        attention, inputs = calls.case(name, device, half)
        results.append([x.cpu() for x in calls.step(attention, inputs, calls.weights(inputs[0])[0])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@attentions
def test_warm_calls_never_wait_for_the_device(name, cuda, half):
    attention, inputs = calls.case(name, cuda, half)
    weight = calls.weights(inputs[0])[0]
    calls.step(attention, inputs, weight)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls.step(attention, inputs, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@attentions
def test_the_same_bits_every_time(name, device):
    attention, inputs = calls.case(name, device, torch.float16)
    weight = calls.weights(inputs[0])[0]
    expected = calls.step(attention, inputs, weight)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2 if device.type == "cpu" else 20):
            attention = calls.case(name, device, torch.float16)[0]  # trajectories whose index is built anew
            got = calls.step(attention, inputs, weight)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
