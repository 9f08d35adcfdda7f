"""The benchmark's own machinery: timing, targets, report, and one tiny run from end to end."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
pytest.importorskip("pytest_benchmark")

from bench import memory, peers, report, shapes, targets, timing, workload  # noqa: E402
from zsvr_kernels import testing  # noqa: E402


class Clock:
    """A clock that contestants advance, so that timing is exact."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, log: list[str], name: str):
        def call() -> None:
            self.now += seconds
            log.append(name)

        return call


def test_percentiles():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert timing.percentile(values, 0.5) == 3.0
    assert timing.percentile(values, 0.2) == pytest.approx(1.8)
    assert timing.percentile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="no values"):
        timing.percentile([], 0.5)


def test_rounds_interleave_and_rotate():
    clock, log = Clock(), []
    contestants = {name: clock.takes(0.5, log, name) for name in ("ours", "a", "b", "c")}
    rounds = timing.Rounds(contestants, clock)
    rounds.warm_up()
    assert rounds.round_seconds == pytest.approx(2.0)
    log.clear()
    rounds.run(3)
    assert log == ["a", "b", "c", "ours", "b", "c", "a", "ours", "c", "a", "b", "ours"]
    assert all(len(samples) == 3 for samples in rounds.samples.values())


def test_fast_calls_are_repeated_and_ratios_are_per_round():
    clock, log = Clock(), []
    contestants = {"ours": clock.takes(1e-4, log, "ours"), "peer": clock.takes(3e-4, log, "peer")}
    rounds = timing.Rounds(contestants, clock)
    rounds.warm_up()
    assert rounds.repeats["ours"] >= 20 and rounds.repeats["peer"] >= 7
    rounds.run(4)
    assert rounds.samples["ours"] == pytest.approx([1e-4] * 4)
    assert rounds.ratios("peer") == pytest.approx([3.0] * 4)


def test_number_of_rounds_has_bounds():
    rounds = timing.Rounds({"ours": lambda: None})
    rounds.round_seconds = 1.0
    assert [rounds.rounds_within(s, 3, 10) for s in (0.0, 5.0, 100.0)] == [3, 5, 10]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's memory counters")
def test_peak_memory_sees_temporaries_and_the_result():
    size = 48 << 20

    def call() -> torch.Tensor:
        temporary = torch.ones(size, dtype=torch.uint8)
        return temporary + 1

    measured = memory.peak_extra(call)
    assert measured is not None and 2 * size * 0.9 < measured < 2 * size * 1.2


def test_every_peer_computes_the_operator():
    for op in ("cross_frame_attention", "trajectory_attention"):
        case = shapes.Case(op, "tiny", 3, "fp32", "fwd", 1)
        q, k, v, _ = workload.tokens(case, grad=False)
        if op == "cross_frame_attention":
            frames = workload.zk.neighbors(3)
            rows = frames.long()
            expected = testing.eager_cross_frame_attention(q, k, v, frames, 0.25)[0]
            found = [peers.sdpa_on_concat(q, k, v, rows), peers.eager_on_concat(q, k, v, rows)]
        else:
            trajectories = workload.zk.chain_links(workload.links(case), window=shapes.WINDOW, backend="reference")
            expected = testing.eager_trajectory_attention(q, k, v, trajectories, 0.25)[0]
            live = trajectories.valid & (trajectories.frames >= 0)[None, :, :, None]
            rows = trajectories.frames.long().clamp(min=0)
            arguments = (q, k, v, trajectories.positions, live, rows, trajectories.grid)
            found = [peers.corner_attention(*arguments), peers.grid_sample_attention(*arguments)]
        for result in found:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["neighbors", "previous"])
def test_the_eager_layer_is_slr_attention_and_the_baseline_is_not(variant):
    case = shapes.Case("slr_attention", "tiny", 4, "fp32", "fwd", 1, variant)
    assert case.name == f"tiny-T4-fp32-fwd-{variant}-1t" and case.describe()["R"] == (1 if variant == "previous" else 2)
    work = workload.slr_attention(case)
    work.check()
    module, context = workload.slr_module(case), workload.slr_context(case)
    x = torch.randn(4, case.C, *case.shape.grid, generator=torch.Generator().manual_seed(3))
    tokens = module.norm(x.flatten(2)).mT
    q, k, v = module.qkv(tokens).unflatten(-1, (3, case.shape.H, case.shape.D))[None].unbind(3)
    trajectories = context.trajectories(case.shape.grid)
    assert trajectories.slots == 5 and context.table().shape[1] == case.describe()["R"]
    y = workload.zk.slr_attention(q, k, v, context.table(), trajectories, backend="reference")
    expected = x + module.proj(y[0].flatten(2)).mT.reshape(x.shape)
    result = peers.slr_layer(module, x, context.table().long(), trajectories)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(work.contestants["spatial_layer"](), work.contestants["ours"](), atol=1e-2)


@pytest.mark.parametrize("direction", ["fwd", "step"])
def test_a_wrong_layer_is_red(direction, monkeypatch):
    original = workload.slr_context

    def parallel(case: shapes.Case) -> workload.zk.VideoContext:
        context = original(case)
        context.configure(context.options.with_(combine="parallel", blend=0.9))
        return context

    monkeypatch.setattr(workload, "slr_context", parallel)
    case = shapes.Case("slr_attention", "tiny", 3, "fp32", direction, 1, "neighbors")
    with pytest.raises(AssertionError, match="exceeds the budget"):
        workload.slr_attention(case).check()


def test_the_corrected_layer_is_corrected():
    case = shapes.Case("slr_attention", "tiny", 3, "fp32", "fwd", 1, "corrected")
    work = workload.slr_attention(case)
    work.check()
    fixed = workload.slr_attention(dataclasses.replace(case, variant="neighbors"))
    assert not torch.allclose(work.contestants["ours"](), fixed.contestants["ours"](), atol=1e-3)
    assert "eager_slr" not in work.contestants and "corrects no links" in work.left_out["eager_slr"]


class Pedantic:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function, setup, rounds, iterations) -> None:
        for _ in range(rounds):
            setup()
            function()


def test_a_baseline_is_timed_although_it_computes_something_else():
    from bench import contest

    case = shapes.Case("slr_attention", "tiny", 3, "fp32", "step", 1, "neighbors")
    record = contest.run(case, Pedantic(), contest.Budget(0.05, 3, 3))
    assert record["check"]["ok"] and set(record["contestants"]) == {"ours", "spatial_layer", "eager_slr"}
    assert record["variant"] == "neighbors" and record["peak_extra_bytes"].keys() == record["contestants"].keys()


def test_the_block_mask_is_the_frame_table():
    frames = workload.zk.neighbors(4)
    blocks = peers.frame_mask(frames.long(), 128, block=64).to_dense()[0, 0].bool()  # [8, 8]
    expected = torch.zeros(4, 4, dtype=torch.bool).scatter_(1, frames.long(), True)
    assert torch.equal(blocks, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_a_mask_refuses_what_it_cannot_say():
    with pytest.raises(ValueError, match="repeats"):
        peers.frame_mask(torch.tensor([[0, 0]]), 64)
    with pytest.raises(ValueError, match="divide"):
        peers.frame_mask(torch.tensor([[0, 1]]), 100)


def test_suites_hold_every_shape_of_the_targets():
    found = {(c.op, c.level, c.dtype, c.direction, c.threads) for n in (1, 2) for op in shapes.FULL
             for c in shapes.cases("full", op, n)}  # fmt: skip
    for threads in (1, 2):
        for dtype in ("fp32", "bf16"):
            assert ("cross_frame_attention", "adm-32", dtype, "fwd", threads) in found
            assert ("trajectory_attention", "adm-32", dtype, "fwd", threads) in found
        assert ("trajectory_attention", "adm-32", "fp32", "step", threads) in found
        assert ("chain_links", "adm-32", "fp32", "fwd", threads) in found
    for level, T in (("adm-32", 16), ("adm-16", 16), ("adm-8", 16), ("sd-64", 8), ("sd-32", 16)):
        for direction in ("fwd", "step"):
            for variant in ("neighbors", "previous"):
                case = shapes.Case("slr_attention", level, T, "fp32", direction, 2, variant)
                assert case in shapes.cases("full", "slr_attention", 2)
    assert {c.T for op in shapes.FULL for n in (1, 2) for c in shapes.cases("full", op, n)} == {8, 16, 32}


def entry(seconds: float, ratio: float | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {"p20": seconds, "p50": seconds, "p80": seconds, "rounds": 5}
    if ratio is not None:
        values["ratio"] = {"p20": ratio, "p50": ratio, "p80": ratio}
    return values


@pytest.fixture
def result() -> dict[str, Any]:
    """A result file with one good case, one that a peer wins, and one that is wrong."""
    good = shapes.Case("cross_frame_attention", "adm-32", 16, "fp32", "fwd", 1)
    beaten = shapes.Case("trajectory_attention", "adm-8", 16, "fp32", "fwd", 1)
    wrong = shapes.Case("chain_links", "adm-32", 16, "fp32", "fwd", 1)
    record = {"check": {"ok": True, "message": ""}, "flops": 1e11, "gathered_bytes": None,
              "memory_traffic_bytes": None, "output_bytes": 1 << 25, "left_out": {"flex": "no such thing"}}  # fmt: skip
    cases = [
        {**good.describe(), **copy.deepcopy(record), "of_fma_peak": entry(0.85),
         "contestants": {"ours": entry(0.5), "sdpa_concat": entry(1.25, 2.5), "ours_out": entry(0.4, 0.8)},
         "peak_extra_bytes": {"ours": (1 << 25) + (1 << 20), "sdpa_concat": 1 << 27}},
        {**beaten.describe(), **copy.deepcopy(record), "flops": None,
         "contestants": {"ours": entry(0.01), "compiled_gather": entry(0.007, 0.7)}, "peak_extra_bytes": {}},
        {**wrong.describe(), "check": {"ok": False, "message": "validity differs"}, "contestants": {}},
    ]  # fmt: skip
    facts = {"device": "Some CPU, 2 cores", "device_slug": "some-cpu", "commit": "c" * 40, "dirty": True,
             "date": "2026-01-02T00:00:00+00:00", "suite": "full", "select": "", "seconds": 60.0,
             "versions": {"torch": "2.13.0"}, "cpu_capability": "avx512"}  # fmt: skip
    probes = {"fma_fp32": 2.4e11, "dot_bf16": None, "tile_bf16": None, "read_l1": 3e11, "read_dram": 1e10}
    return {
        "schema": 1,
        "provenance": facts,
        "runs": [{"allocator": "R", "threads": 1, "probes": probes, "cases": cases}],
    }


def test_report_puts_wrong_and_slow_first(result):
    text = report.render(result)
    order = ["## Wrong results", "## Regressions", "## Targets", "## Ceilings", "## cross_frame_attention"]
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    wrong, slow = text[places[0] : places[1]], text[places[1] : places[2]]
    assert "validity differs" in wrong and "chain_links adm-32" in wrong
    assert "compiled_gather is faster" in slow and "0.70" in slow and "ours_out" not in slow
    assert "chain_links adm-32" not in text[places[1] :], "a wrong case must report no speed"
    assert "with uncommitted changes" in text and "no such thing" in text


def test_report_compares_with_the_previous_result(result):
    before = copy.deepcopy(result)
    before["runs"][0]["cases"][0]["contestants"]["ours"]["p50"] = 0.25
    rows = report.regressions(result, before)
    assert [row[0].split()[0] for row in rows] == ["cross_frame_attention", "trajectory_attention"]
    assert "was 250.00 ms, is 500.00 ms" in rows[0][2]
    before["runs"][0]["cases"][0]["contestants"]["ours"]["p50"] = 0.48  # within the noise
    assert len(report.regressions(result, before)) == 1


def test_targets_read_the_result(result):
    lines = {line.what: line for line in targets.lines(result)}
    assert lines["ratio to sdpa_concat"].met and lines["share of the float32 FMA peak"].met
    assert lines["ratio to sdpa_concat"].note.startswith("possible 3.00")
    assert not lines["ratio to compiled_gather"].met
    assert lines["MB beyond output, lse and V pack"].reached == pytest.approx(0.5)
    result["runs"][0]["cases"][0]["of_fma_peak"] = entry(0.5)
    lines = {line.what: line for line in targets.lines(result)}
    assert not lines["share of the float32 FMA peak"].met


def test_the_layer_is_held_to_the_one_it_replaces(result):
    case = shapes.Case("slr_attention", "adm-32", 16, "fp32", "fwd", 1, "neighbors")
    record = {
        **case.describe(), "check": {"ok": True, "message": ""}, "flops": 1e11, "output_bytes": 1 << 25,
        "contestants": {"ours": entry(0.5), "spatial_layer": entry(0.4, 0.8), "eager_slr": entry(2.0, 4.0)},
        "peak_extra_bytes": {"ours": 130, "spatial_layer": 100, "eager_slr": 300},
    }  # fmt: skip
    result["runs"][0]["cases"] = [record]
    lines = {line.what: line for line in targets.lines(result)}
    assert set(lines) == {"spatial layer's time over ours", "peak extra memory over the spatial layer's"}
    assert [(line.reached, line.met) for line in lines.values()] == [(0.8, False), (1.3, False)]
    record["contestants"]["spatial_layer"], record["peak_extra_bytes"]["ours"] = entry(0.6, 1.2), 120
    assert all(line.met for line in targets.lines(result))
    # A baseline that is faster is a matter for the targets, a peer that is faster is a regression.
    record["contestants"] |= {"spatial_layer": entry(0.4, 0.8), "eager_slr": entry(0.3, 0.6)}
    assert [row[2] for row in report.regressions(result, None)] == ["eager_slr is faster"]
    text = report.render(result)
    assert "## slr_attention" in text and "spatial_layer 0.80" in text and "SHORT" in text
    row = "| adm-32: 32x32, H=8, D=64, T=16 | neighbors | fwd | fp32 | 500.0 | 0.80x | 0.60x | 0.0 / 0.0 / 0.0 |"
    assert row in report.readme(result) and "| operator |" not in report.readme(result)
    for changes in ({"variant": "corrected"}, {"dtype": "bf16"}, {"grid": [16, 16]}):
        result["runs"][0]["cases"] = [{**record, **changes}]
        assert not targets.lines(result), changes


def test_roofline_takes_the_slowest_resource(result):
    record, ceilings = result["runs"][0]["cases"][0], result["runs"][0]["probes"]
    assert report.roofline(record, ceilings) == (pytest.approx(1e11 / 2.4e11), "fma_fp32")
    record["memory_traffic_bytes"] = 1e11
    assert report.roofline(record, ceilings) == (pytest.approx(10.0), "read_dram")


def test_readme_table_is_compact(result):
    text = report.readme(result)
    assert "sdpa_concat 2.5x" in text and "ours_out" not in text and "chain_links" not in text
    assert text.splitlines()[0].startswith("| operator |")


def test_a_red_check_reports_no_speed(monkeypatch):
    from bench import contest

    def broken(case: shapes.Case) -> workload.Workload:
        def check() -> None:
            raise AssertionError("wrong on purpose")

        return workload.Workload({"ours": lambda: pytest.fail("a wrong operator was timed")}, check)

    monkeypatch.setitem(workload.BUILD, "chain_links", broken)
    case = shapes.Case("chain_links", "tiny", 3, "fp32", "fwd", 1)
    record = contest.run(case, None, contest.Budget(1.0, 3, 3))
    assert record["check"] == {"ok": False, "message": "wrong on purpose"} and record["contestants"] == {}


def test_one_command_writes_a_result_with_its_provenance(tmp_path):
    command = [sys.executable, "-m", "bench", "--smoke", "--allocator", "R", "--select", "chain_links"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    facts = written["provenance"]
    for name in ("date", "device", "commit", "dirty", "versions", "cpu_capability", "suite", "seconds"):
        assert name in facts, name
    assert facts["versions"]["torch"] == torch.__version__
    (run,) = written["runs"]
    assert run["allocator"] == "R" and run["threads"] == 1 and run["probes"]["mm_fp32"] > 0
    (record,) = run["cases"]
    assert record["check"]["ok"] and record["contestants"]["ours"]["p50"] > 0
    assert record["contestants"]["eager"]["ratio"]["p50"] > 0
    assert "## Targets" in path.with_suffix(".md").read_text()
    empty = subprocess.run([*command[:-1], "no such case", "--out", str(tmp_path)], cwd=ROOT, capture_output=True)
    assert empty.returncode != 0
