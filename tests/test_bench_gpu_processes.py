"""Child processes of `make gpu`: workers that die, builds and tests that hang."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import sysconfig
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.gpu import __main__ as entry  # noqa: E402
from bench.gpu import processes, report  # noqa: E402
from bench.gpu.state import Deadline, State  # noqa: E402


@pytest.fixture
def state(tmp_path: pathlib.Path) -> State:
    return State(tmp_path / "state", "print")


WORKER = """
import os, pathlib, sys, time
from bench.gpu.state import State
state = State(pathlib.Path({folder!r}), "print")
for name in ("dies", "sleeps", "is fine"):
    if state.get(name) is not None:
        continue
    state.enter(name)
    if name == "dies":
        print("last words", flush=True)
        os._exit(139)
    if name == "sleeps":
        time.sleep(60)
    state.keep(name, "atomics", "done", 0.1, result={{"rows": []}})
    state.leave()
"""


def test_a_gpu_that_does_not_answer_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(entry, "PROBE_SECONDS", 0.01)
    assert entry.main(["--dry"]) == 2 and "finds its GPU within" in capsys.readouterr().out


def test_a_step_that_kills_its_process_fails_alone(state, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(state.folder)))
    limits = {"dies": 60.0, "sleeps": 0.5, "is fine": 60.0}
    command = [sys.executable, str(script)]
    assert processes.run_workers(state, limits, tmp_path / "logs", Deadline(time.time() + 60), command) == ""
    assert "exit status 139" in state.get("dies")["error"] and "last words" in state.get("dies")["error"]
    assert "longer than 0 s" in state.get("sleeps")["error"]
    assert state.get("is fine")["status"] == "done" and state.running() is None
    result = report.collect(state, [], list(limits))
    assert [f["name"] for f in result["failed"]] == ["dies", "sleeps"] and report.is_result_red(result)
    assert report.is_red(state.get("dies")) and not report.is_red(state.get("is fine"))


def test_a_worker_that_cannot_start_is_not_started_for_ever(state, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such device')"]
    said = processes.run_workers(state, {"a": 1.0}, tmp_path / "logs", Deadline(time.time() + 60), command)
    assert "before its first step" in said and "no such device" in said


def test_the_deadline_ends_a_worker_without_a_verdict(state, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.2)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(state.folder)).replace("os._exit(139)", "time.sleep(60)"))
    processes.run_workers(
        state, {"dies": 60.0}, tmp_path / "logs", Deadline(time.time() + 1.5), [sys.executable, str(script)]
    )
    assert state.get("dies") is None and state.running() is None


@pytest.mark.parametrize(
    ("setup", "budget", "outcome"),
    [
        (
            "import pathlib, sys; pathlib.Path(sys.argv[0]).parent.joinpath('zsvr_kernels', {module!r}).touch()",
            60,
            "built",
        ),
        ("print('warning: no native module (no compiler); the pure-PyTorch'); print('backends')", 60, "no compiler"),
        ("import time; time.sleep(60)", 60, "took too long"),
        ("import time; time.sleep(60)", 0.2, None),
    ],
)
def test_the_native_module_is_built_beside_the_tests(setup, budget, outcome, state, tmp_path, monkeypatch):
    (tmp_path / "zsvr_kernels").mkdir()
    (tmp_path / "setup.py").write_text(setup.format(module=f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"))
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    if "sleep" in setup:
        monkeypatch.setattr(processes, "BUILD_SECONDS", 1.0)
    inside = []
    with processes.building(state, tmp_path / "logs", Deadline(time.time() + budget), False):
        inside.append(state.get("build"))
    record = state.get("build")
    assert inside == [None] and (outcome is None) == (record is None)
    assert record is None or outcome in " ".join(record["result"].values())


@pytest.mark.parametrize("is_over", [True, False])
def test_a_test_file_that_hangs_says_what_had_failed(is_over, state, tmp_path, monkeypatch):
    path = tmp_path / "test_hangs.py"
    path.write_text(
        "import subprocess, time\ndef test_a():\n    assert 1 == 2\n"
        "def test_b():\n    subprocess.Popen(['sleep', '77'])\n    open('began', 'w').close()\n    time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    stop = 60.0 if is_over else 8.0
    monkeypatch.setattr(processes, "TEST_SECONDS", 8.0 if is_over else 60.0)
    monkeypatch.setattr(processes, "environment", lambda: dict(os.environ))
    processes.run_tests(state, [path.name], tmp_path / "out", Deadline(time.time() + stop))
    assert (tmp_path / "began").exists()
    log = (tmp_path / "out" / "tests" / "test_hangs.log").read_text()
    assert "1 failed" in log and "KeyboardInterrupt" in log
    record = state.get(f"tests {path.name}")
    if is_over:
        said = dict(record["result"]["failed"])
        assert record["result"]["failures"] == 1 and said[path.name] == "over 8 s"
        assert any(name.endswith("test_a") for name in said)
    else:
        assert record is None
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 77" not in left.splitlines()


def test_junit_reports_are_read(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_c(): pass\n"
    )
    xml = tmp_path / "x.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(path), f"--junitxml={xml}", "-p", "no:cacheprovider"],
        capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    found = processes.junit(xml)
    assert (found["tests"], found["failures"], found["skipped"], found["skips"]) == (3, 1, 1, ["no GPU"])
    assert found["failed"][0][0].endswith("test_b") and "assert 1 == 2" in found["failed"][0][1]
