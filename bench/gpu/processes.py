"""Child processes of a run: the native build, the tests, and the workers that measure, watched and ended in time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu.state import Deadline, State

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD_SECONDS = 200.0
NICE = ["nice", "-n", "10"] if shutil.which("nice") else []  # tests run beside the build
TEST_SECONDS = 240.0
TESTS_AT_ONCE = 8  # most of their time is the compiler's
GRACE = 3.0  # seconds beyond the deadline in which a step may still end
BROKEN = 3  # exit status of a worker that cannot go on, where another can


def environment() -> dict[str, str]:
    """Return the environment of children: this checkout on the path, caches that the next run finds again."""
    cache = ROOT / "build" / "gpu-cache"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a checkout that cannot be written to
        cache = pathlib.Path.home() / ".cache" / "zsvr-gpu"
    path = [str(ROOT), str(ROOT / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def child(command: list[str], log: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a group of its own, its output in a file; whatever is left of it ends with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have left processes of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: pathlib.Path, lines: int = 12) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])[-1500:]
    except OSError:
        return ""


@contextlib.contextmanager
def building(state: State, logs: pathlib.Path, deadline: Deadline, dry: bool) -> Iterator[None]:
    """Compile the native module in place beside the block, and wait for it after it; no network is needed.

    Everything goes on without the module, and the report says so. What the deadline cuts off is tried again next time.
    """
    if state.get("build") is not None:
        yield
        return
    start, log = time.monotonic(), logs / "build.log"
    sources = [p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h")]
    module = ROOT / "zsvr_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    said, status = "", None
    if module.exists() and module.stat().st_mtime >= max(sources, default=0.0):
        outcome = "it was there"
        yield
    elif dry:
        outcome = "none: a dry run builds none"
        yield
    else:
        with child([*NICE, sys.executable, "setup.py", "-q", "build_ext", "--inplace"], log) as process:
            yield
            left = min(BUILD_SECONDS - (time.monotonic() - start), deadline.left())
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=max(left, 0.0))
        if status is None and deadline.left() <= 0:
            return
        if status == 0 and module.exists():
            outcome = "built"
        else:
            outcome = "none, as with ZSVR_NATIVE=0:"
            text = tail(log, 40)
            reason = re.search(r"no native module \((.*?)\); the pure", text, re.S)  # as setup.py puts it
            said = "its build took too long" if status is None else reason[1] if reason else text[-300:]
    result = {"outcome": outcome, "said": said}
    state.keep("build", "build", "done", time.monotonic() - start, result=result)


def test_files(folders: tuple[str, ...]) -> list[str]:
    """Return the test files of some folders, relative to the checkout."""
    return [str(p.relative_to(ROOT)) for folder in folders for p in sorted((ROOT / folder).glob("test_*.py"))]


def junit(path: pathlib.Path) -> dict[str, Any]:
    """Return numbers of tests and what failed, from pytest's report."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{path} holds no test suite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = []
    for case in suite.iter("testcase"):
        for what in (*case.findall("failure"), *case.findall("error")):
            said = (what.get("message") or "").splitlines()
            failed.append([f"{case.get('classname')}.{case.get('name')}", said[0][:300] if said else what.tag])
    reasons = sorted({(s.get("message") or "")[:200] for s in suite.iter("skipped")})
    return counts | {"failed": failed[:50], "skips": reasons[:10]}


def interrupt(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let pytest say what it has found so far; it is not waited for longer than `GRACE`."""
    stop = time.monotonic() + GRACE
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(stop - time.monotonic(), 0.0))


def run_tests(state: State, files: list[str], out: pathlib.Path, deadline: Deadline) -> None:
    """Run test files, several at a time; what the deadline cuts off is run again next time."""
    waiting = [f for f in files if state.get(f"tests {f}") is None]
    with contextlib.ExitStack() as ended:
        running: dict[str, tuple[subprocess.Popen[bytes], float, Callable[[], Any]]] = {}
        while (waiting or running) and deadline.left() > 0:
            while waiting and len(running) < TESTS_AT_ONCE:
                name = waiting.pop(0)
                slug = name.removesuffix(".py").replace("/", "-")
                (out / "tests" / f"{slug}.xml").unlink(missing_ok=True)
                command = [sys.executable, "-m", "pytest", "-q", name, "-p", "no:cacheprovider", "-o",
                           "filterwarnings=default", f"--junitxml={out / 'tests' / slug}.xml"]  # fmt: skip
                one = contextlib.ExitStack()
                ended.push(one)
                process = one.enter_context(child(command, out / "tests" / f"{slug}.log"))
                running[name] = (process, time.monotonic(), one.close)
            for name, (process, start, close) in list(running.items()):
                seconds = time.monotonic() - start
                is_over = process.poll() is None
                if is_over and seconds < TEST_SECONDS:
                    continue
                if is_over:
                    interrupt([process])
                close()
                del running[name]
                slug = name.removesuffix(".py").replace("/", "-")
                try:
                    result = junit(out / "tests" / f"{slug}.xml")
                except (OSError, ValueError, ElementTree.ParseError):
                    said = "" if is_over else f"exit status {process.returncode}: "
                    said += tail(out / "tests" / f"{slug}.log", 3)
                    result = {
                        "tests": 0,
                        "failures": 0,
                        "errors": 1,
                        "skipped": 0,
                        "skips": [],
                        "failed": [[name, said]],
                    }
                if is_over:
                    result["errors"] += 1
                    result["failed"].append([name, f"over {TEST_SECONDS:.0f} s"])
                state.keep(f"tests {name}", "tests", "done", seconds, result=result)
            time.sleep(0.1)
        interrupt([process for process, _, _ in running.values()])  # their logs say what failed until now


def run_workers(
    state: State,
    limits: dict[str, float],
    logs: pathlib.Path,
    deadline: Deadline,
    command: list[str],
    between: Callable[[], None] = lambda: None,
) -> str:
    """Run workers until all steps are done or time is up; a step that kills its worker fails, the rest goes on.

    Args:
        limits: step -> seconds it may take.
        command: of a worker.
        between: called about once a minute.

    Returns:
        Why no further worker could be started, or "".
    """
    strange = 0
    for number in range(len(limits) + 3):
        if deadline.left() <= 0:
            break
        state.leave()
        log = logs / f"worker-{os.getpid()}-{number}.log"
        with child(command, log) as process:
            told = time.monotonic()
            while process.poll() is None:
                entry = state.running()
                over = entry is not None and time.time() - entry[1] > limits.get(entry[0], 60.0)
                if over or deadline.left() < -GRACE:
                    break
                if time.monotonic() - told > 60:
                    between()
                    told = time.monotonic()
                time.sleep(0.1)
            status = process.poll()
        entry = state.running()
        state.leave()
        if status == 0 or deadline.left() < -GRACE:
            break
        if entry is not None:
            name, began = entry
            seconds = time.time() - began
            why = f"took longer than {limits.get(name, 60.0):.0f} s" if status is None else f"exit status {status}"
            state.keep(name, "crash", "failed", seconds, error=f"its process ended: {why}. {tail(log)}")
        elif status != BROKEN:
            strange += 1
            if strange == 2:
                return f"a worker ended with exit status {status} before its first step: {tail(log)}"
    return ""
