"""`make gpu` as far as a CPU goes: every step of a dry run, cuts and budgets, red results, the report."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
pytest.importorskip("pytest_benchmark")

from bench import contest, peers, shapes, workload  # noqa: E402
from bench.gpu import ceilings, plan, race, report, windows, worker  # noqa: E402
from bench.gpu.machine import Cuda, Host, best  # noqa: E402
from bench.gpu.state import State, source_hash  # noqa: E402


@pytest.fixture
def state(tmp_path: pathlib.Path) -> State:
    return State(tmp_path / "state", "print")


def run(*arguments: str, module: str = "bench.gpu", **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


# ---- what is kept ----


def test_a_record_is_kept_whole_and_counts_for_its_fingerprint_alone(state):
    assert state.get("a step") is None
    state.keep("a step", "case", "done", 1.0, result={"x": 1})
    assert state.get("a step")["result"] == {"x": 1}
    assert State(state.folder, "another").get("a step") is None
    (state.folder / "a-step.json").write_text('{"name": "a st')  # as a cut write would leave it
    assert state.get("a step") is None
    state.keep("a step", "case", "done", 1.0)
    state.forget("a step")
    assert state.get("a step") is None and not list(state.folder.glob(".*"))
    first = state.began()
    assert state.began() == first


def test_the_fingerprint_follows_the_sources(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("1")
    before = source_hash(tmp_path)
    (tmp_path / "bench" / "notes.md").write_text("2")
    (tmp_path / "zsvr_kernels").mkdir()
    (tmp_path / "zsvr_kernels" / "_native_build.txt").write_text("no compiler")  # between one run and the next
    assert source_hash(tmp_path) == before
    (tmp_path / "bench" / "a.py").write_text("2")
    assert source_hash(tmp_path) != before


# ---- the plan ----


def test_the_plan_begins_with_what_matters_and_names_steps_once():
    steps = plan.steps()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) and names[:2] == ["facts", "ceilings"]
    head = [step.case for step in steps if step.kind == "case"][:24]
    assert {(c.op, c.level, c.direction) for c in head} == {
        (op, level, direction)
        for op in ("cross_frame_attention", "trajectory_attention") for level in plan.LEVELS
        for direction in ("fwd", "bwd")
    }  # fmt: skip
    every = [step.case for step in steps if step.case is not None]
    assert {c.op for c in every} == set(shapes.FULL) and {c.dtype for c in every} == set(shapes.DTYPES)
    assert {c.T for c in every} == {16, 64}
    assert {step.kind for step in steps} == {step.kind for step in plan.steps(dry=True)}
    assert all(step.seconds < step.limit for step in steps)


def test_every_shape_of_the_plan_can_be_described():
    for step in plan.steps():
        if step.case is not None:
            described = step.case.describe()
            assert step.name == f"{step.group} {step.case.op} {described['name']}"
            assert described.get("L") in (None, 5, step.case.T)


# ---- a run from end to end ----


def interpreted() -> dict[str, str]:
    try:
        import triton  # noqa: F401
    except ImportError:
        return {}
    return {"TRITON_INTERPRET": "1"}


def test_a_dry_run_is_cut_goes_on_and_is_green(tmp_path):
    arguments = ("--dry", "--out", str(tmp_path))
    none = run(*arguments, "--budget", "0", **interpreted())
    assert none.returncode == 0 and "steps left: run the same command again" in none.stdout, none.stderr
    result = json.loads((tmp_path / "report.json").read_text())
    assert {"facts", "ceilings"} <= set(result["left"]) and not result["cases"]
    state = tmp_path / "state"
    cut = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
        env={**os.environ, **interpreted()},
    )  # fmt: skip
    while not (state / "ceilings.json").exists():
        assert cut.poll() is None, "the run ended before it was cut"
        time.sleep(0.05)
    cut.terminate()
    cut.communicate()
    kept = {path: path.stat().st_mtime_ns for path in state.glob("*.json")}
    assert len(kept) < len(plan.steps(dry=True)) + 3
    done = run(*arguments, **interpreted())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2].startswith("green")
    for path, at in kept.items():
        assert path.stat().st_mtime_ns == at, f"{path.name} was done again"
    result = json.loads((tmp_path / "report.json").read_text())
    assert not result["left"] and not result["failed"]
    assert bool(result["skipped"]) is not bool(interpreted()) and bool(result["gather"]) is bool(interpreted())
    assert {c["op"] for c in result["cases"]} == set(shapes.FULL)
    for case in result["cases"]:
        assert case["check"]["ok"] and all(case["contestants"]["ours"][mode]["p50"] > 0 for mode in race.MODES)
    assert result["ceilings"]["mm_bf16"] > 0 and result["windows"][0]["kernels"]["flash"]["compared"]["dk"]["equal"]
    assert result["provenance"]["versions"]["torch"] == torch.__version__
    (test,) = result["tests"]
    assert test["tests"] == test["skipped"] > 0 and test["skips"]
    text = (tmp_path / "report.md").read_text()
    for heading in ("## Where a peer is faster", "## Roofs", "## cross_frame_attention", "## Gathered rows"):
        assert heading in text
    (copy,) = (tmp_path / "results").glob("*/*-gpu.md")
    assert copy.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(tmp_path):
    done = run("--out", str(tmp_path / "none"))
    assert done.returncode == 2 and "an NVIDIA GPU that torch can use" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "none").exists()


# ---- the machine, without one ----


class Clock:
    now = 0.0


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Graph:
    def replay(self) -> None:
        Clock.now += 2.9e-5


@pytest.fixture
def cuda(monkeypatch):
    """A Cuda machine whose events read a clock that calls and replays advance."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: contextlib.nullcontext())
    for name in ("synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    machine = object.__new__(Cuda)
    machine.device, machine.elapsed, machine.stream, machine._pool = torch.device("cuda", 0), 0.0, None, None
    machine._flushed, machine._smi = torch.zeros(8, dtype=torch.uint8), "0"
    return machine


def test_a_contestant_is_timed_cold_warm_and_eager(cuda):
    called = []

    def call() -> None:
        called.append(1)
        Clock.now += 2e-4

    prepared = cuda.prepare(call)
    # Two to warm up and one timed; a graph of one call, one of as many as fill WARM_SECONDS.
    assert prepared.why_not_graphed == "" and len(called) == 2 + 1 + 1 + 10 and not cuda.is_spent
    for timed, expected in ((prepared.cold, 2.9e-5), (prepared.warm, 2.9e-6), (prepared.eager, 2e-4)):
        before = cuda.now()
        timed()
        assert cuda.now() - before == pytest.approx(expected)
    assert bool((cuda._flushed == 1).all())
    cuda.tidy()


def test_what_cannot_be_captured_is_called(cuda, monkeypatch):
    def refuse(graph, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    called = []
    prepared = cuda.prepare(lambda: called.append(1))
    assert prepared.why_not_graphed == "operation not permitted when stream is capturing" and cuda.is_spent
    before = len(called)
    prepared.cold()
    assert len(called) == before + 1


def test_clocks_are_read_by_drivers_of_either_name(cuda, monkeypatch):
    asked = []

    def answer(command, **_):
        asked.append(command[2])
        old = "clocks_throttle_reasons.active" in command[2]
        return subprocess.CompletedProcess(
            command, 0 if old else 2, "1830, 2619, 41, 210.5, P0, 0x0\n" if old else "", ""
        )

    monkeypatch.setattr(subprocess, "run", answer)
    assert cuda.clocks() == {
        "clocks.sm": "1830", "clocks.mem": "2619", "temperature.gpu": "41", "power.draw": "210.5", "pstate": "P0",
        "throttle_reasons": "0x0",
    }  # fmt: skip
    assert len(asked) == 2 and all(x.startswith("--query-gpu=") for x in asked)
    monkeypatch.setattr(subprocess, "run", mock.Mock(side_effect=FileNotFoundError))
    assert cuda.clocks() == {}


# ---- cases ----


def case(op: str, direction: str = "fwd", variant: str = "") -> shapes.Case:
    return shapes.Case(op, "tiny", 3, "fp32", direction, 0, variant, "cpu", "reference")


def test_a_red_check_reports_no_time(monkeypatch):
    def broken(case: shapes.Case) -> workload.Workload:
        def check() -> None:
            raise AssertionError("wrong on purpose")

        return workload.Workload({"ours": lambda: pytest.fail("a wrong operator was timed")}, check)

    monkeypatch.setitem(workload.BUILD, "chain_links", broken)
    record = race.run(case("chain_links"), Host(), "core")
    assert record["check"] == {"ok": False, "message": "wrong on purpose"} and not record["contestants"]


def test_a_peer_that_cannot_be_prepared_is_left_out(monkeypatch):
    class Full(Host):
        prepared = 0

        def prepare(self, call):
            self.prepared += 1
            if self.prepared == 2:
                raise torch.OutOfMemoryError("out of memory on purpose")
            return super().prepare(call)

    record = race.run(case("link_score"), Full(), "core")
    assert record["left_out"]["eager"] == "out of memory on purpose" and set(record["contestants"]) == {"ours"}


def test_groups_share_out_the_peers():
    for group, expected in (("core", {"ours", "eager"}), ("compiled", {"ours", "compiled"})):
        names = {name for name in ("eager", "compiled") if race.is_wanted(group, name)} | {"ours"}
        assert names == expected


def test_a_backward_runs_its_forward_once_and_only_if_it_takes_part():
    work = workload.cross_frame_attention(case("cross_frame_attention", "bwd"))
    first, again = work.contestants["ours"](), work.contestants["ours"]()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    record, _, running = contest.enlist(case("cross_frame_attention", "bwd"), lambda name: name == "eager")
    assert set(running) == {"ours", "eager"} and record["check"]["ok"]


def test_peers_of_gpus_compute_the_operator():
    q, k, v, _ = workload.tokens(case("cross_frame_attention"), grad=False)
    rows = workload.zk.neighbors(3).long()
    found = peers.on_cuda(q, k, v, rows)
    assert {"sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn"} == set(found)
    torch.testing.assert_close(found["sdpa_flash"](), peers.sdpa_on_concat(q, k, v, rows))  # a CPU has this one alone
    with pytest.raises(RuntimeError):
        found["sdpa_cudnn"]()


@pytest.mark.parametrize("op", ["cross_frame_attention", "trajectory_attention", "correspondence_search", "link_score"])
def test_no_peer_brings_numbers_from_the_host_which_a_graph_cannot_capture(op):
    work = workload.BUILD[op](shapes.Case(op, "tiny", 3, "fp32", "fwd", 0))
    eager = [call for name, call in work.contestants.items() if "ours" not in name and name not in race.COMPILED]
    assert eager
    with mock.patch.object(torch, "tensor", side_effect=AssertionError("a tensor of numbers from the host")):
        for call in eager:
            call()


def test_windows_overlap_and_are_what_they_say():
    x = torch.arange(4 * 3 * 2 * 8, dtype=torch.float32).reshape(4, 3, 2, 8)
    view = windows.overlapping(x)
    assert view.data_ptr() == x.data_ptr() and view.shape == (3, 2, 6, 8)
    assert torch.equal(view[1], torch.cat((x[1], x[2])).transpose(0, 1))


def test_gathers_have_the_patterns_they_are_named_after():
    generator = torch.Generator().manual_seed(0)
    rows = {pattern: ceilings._rows(pattern, 4096, 1000, generator) for pattern in ceilings.PATTERNS}
    assert all(r.dtype == torch.int32 and int(r.min()) >= 0 and int(r.max()) < 1000 for r in rows.values())
    assert int(rows["identical"].max()) == 0
    steps = {pattern: (r[4:].long() - r[:-4].long()).abs().float().median() for pattern, r in rows.items()}
    assert steps["smooth"] <= 2 < 100 < steps["random"]


def test_the_least_time_is_taken():
    machine = Host()
    assert 0 < best(machine, lambda: time.sleep(1e-4), samples=3) < 1.0
    assert worker.facts(machine)["device_slug"] == "dry-run-on-a-cpu"


# ---- the report ----


@pytest.fixture
def result(state: State) -> dict[str, Any]:
    """A result as a GPU would leave it: a good case, one that a peer wins, one that is wrong, a failed test."""

    def timed(seconds: float, ratio: float | None = None) -> dict[str, Any]:
        entry: dict[str, Any] = {"p20": seconds, "p50": seconds, "p80": seconds, "rounds": 5}
        return entry if ratio is None else entry | {"ratio": {"p20": ratio, "p50": ratio, "p80": ratio}}

    def modes(seconds: float, ratio: float | None = None) -> dict[str, Any]:
        return {mode: timed(seconds, ratio) for mode in race.MODES}

    def make(op: str, level: str, direction: str, **fields: Any) -> dict[str, Any]:
        described = shapes.Case(op, level, 16, "bf16", direction, 0, "", "cuda", "triton").describe()
        return {**described, "group": "core", "check": {"ok": True, "message": ""}, "left_out": {"flex": "a | b"},
                "peak_extra_bytes": {"ours": 1 << 20}, "output_bytes": 1 << 20,
                "clocks": {"clocks.sm": "1830", "throttle_reasons": "0x0"}, **fields}  # fmt: skip

    good = make("cross_frame_attention", "adm-32", "fwd", flops=7.9e10,
                contestants={"ours": modes(2e-4), "sdpa_flash": modes(3e-4, 1.5),
                             "ours_sdpa": modes(1e-4, 0.5)})  # fmt: skip
    beaten = make("trajectory_attention", "adm-8", "fwd", flops=1e9, gathered_bytes=1e8,
                  contestants={"ours": modes(1e-4), "eager_gather": modes(8e-5, 0.8)})  # fmt: skip
    wrong = make("chain_links", "adm-32", "fwd", check={"ok": False, "message": "validity differs"}, contestants={})
    for record in (good, beaten, wrong):
        state.keep(f"core {record['op']}", "case", "done", 1.0, result=record)
    state.keep("facts", "facts", "done", 1.0, result={"device": "NVIDIA H200", "device_slug": "nvidia-h200",
               "commit": "c" * 40, "dirty": False, "versions": {"torch": "2.11.0"}})  # fmt: skip
    state.keep("ceilings", "ceilings", "done", 1.0, result={"mm_bf16": 7.9e14, "exp2": 3.86e12, "hbm_copy": 4e12,
               "launch_seconds": 3e-6})  # fmt: skip
    state.keep("gather 128", "gather", "done", 1.0, result={"rows": [
        {"row_bytes": 128, "pattern": "smooth", "megabytes": 5, "flight": 4, "rate": 2e12}]})  # fmt: skip
    state.keep("tests tests/gpu/test_x.py", "tests", "done", 1.0, result={"tests": 2, "failures": 1, "errors": 0,
               "skipped": 0, "skips": [], "failed": [["test_x.test_a", "1 == 2"]]})  # fmt: skip
    steps = ["facts", "ceilings", "gather 128", "atomics"]
    steps += [f"core {r['op']}" for r in (good, beaten, wrong)]
    return report.collect(state, ["tests tests/gpu/test_x.py"], steps)


def test_the_report_says_first_what_is_red(result):
    text = report.render(result)
    assert text.splitlines()[2] == "**RED: 2 failures.**"
    order = ["test_x.test_a", "validity differs", "## Where a peer is faster", "## Roofs", "## cross_frame_attention"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    slow = text[places[2] : places[3]]
    assert (
        "trajectory_attention adm-8" in slow
        and "eager_gather" in slow
        and "ours_sdpa" in slow
        and "sdpa_flash" not in slow
    )
    assert "chain_links adm-32" not in text[places[2] : text.index("## Peers left out")]
    assert "a \\| b" in text and "| atomics | not yet |" in text
    assert report.summary(result).startswith("RED: 2 failures") and "2 steps left" in report.summary(result)


def test_roofs_are_the_slowest_resource(result):
    good, beaten = result["cases"][:2]
    assert report.roof(good, result) == (pytest.approx(1e-4), "matmul")
    assert report.roof(beaten, result) == (pytest.approx(5e-5), "gather")
    result["ceilings"]["exp2"] = 1e12
    exponentials = 7.9e10 / (4 * 64)
    assert report.roof(good, result) == (pytest.approx(exponentials / 1e12), "exp")
    assert "50% of matmul" in report.render({**result, "ceilings": {"mm_bf16": 7.9e14}})


def test_predictions_stand_beside_what_was_measured(result, tmp_path, monkeypatch):
    known = {"us": 100.0, "serial_us": 180.0, "bound": "mma"}
    machines = {"h100": {**known, "us": 125.0}, "h200": known}
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({"cases": {"cross_frame_attention/adm-32/T16/bf16/fwd": {"machines": machines}}}))
    monkeypatch.setattr(report, "PREDICTIONS", path)
    assert "100.0..180.0 (mma): 2.00x" in report.render(result)
    good = result["cases"][0]
    assert report.predicted(good, report.predictions(), "NVIDIA H100 80GB")["us"] == 125.0
    assert report.predicted({**good, "variant": "full"}, report.predictions(), "NVIDIA H200") is None
    monkeypatch.setattr(report, "PREDICTIONS", tmp_path / "none.json")
    assert report.predictions() == {} and "(mma)" not in report.render(result)
