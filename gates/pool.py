"""Workers of each release of Triton, fed one compile at a time; a worker that dies has failed its compile only."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gates.describe import ROOT, Description

BUILD = ROOT / "build"
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One compile; equal to another if version, target and key are."""

    version: str
    target: str
    key: str
    description: Description = field(compare=False)


def interpreter(version: str) -> str:
    """Return the Python whose Triton is of a release, such as ``"3.6"``.

    Raises:
        FileNotFoundError: neither this environment nor ``build/triton-<version>`` has it.
    """
    if importlib.metadata.version("triton").split(".")[:2] == version.split(".")[:2]:
        return sys.executable
    path = BUILD / f"triton-{version}" / "bin" / "python"
    if not path.exists():
        raise FileNotFoundError(f"Triton {version} is not here: 'make build/triton-{version}/.installed' installs it")
    return str(path)


class Worker:
    """A process of ``gates.worker``, started when first asked."""

    def __init__(self, version: str, folder: pathlib.Path) -> None:
        self.version, self.folder = version, folder / f"triton-{version}"
        self.process: subprocess.Popen[str] | None = None
        self.triton = ""

    def _start(self) -> subprocess.Popen[str]:
        # TRITON_DEFAULT_FP_FUSION: an unset one makes Triton 3.9 warn.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {
            "TRITON_CACHE_DIR": str(self.folder / "cache"),
            "TRITON_DEFAULT_FP_FUSION": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [interpreter(self.version), "-m", "gates.worker", str(self.folder / "found")]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        hello = process.stdout.readline()
        if not hello:
            raise RuntimeError(f"the worker of Triton {self.version} did not start: {' '.join(command)}")
        self.triton = json.loads(hello)["triton"]
        return process

    def compile(self, job: Job) -> Result:
        """Return what a compile found, or ``{"error": ...}``."""
        if self.process is None:
            self.process = self._start()
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        try:
            process.stdin.write(json.dumps({"target": job.target, "description": job.description}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass
        if answer:
            return json.loads(answer)
        status, self.process = process.wait(), None
        return {"error": f"the compiler ended its process (exit status {status})"}

    def stop(self) -> None:
        if self.process is not None and self.process.stdin is not None and self.process.stdout is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def compile_all(
    jobs: list[Job],
    threads: int = 1,
    folder: pathlib.Path = BUILD / "gates",
    done: Callable[[Job, Result], None] = lambda job, result: None,
) -> tuple[dict[Job, Result], dict[str, str]]:
    """Compile every job; return results, and the exact release of Triton for each version asked for.

    Equal jobs should be given once. ``done`` is called under a lock as results arrive.
    """
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    results: dict[Job, Result] = {}
    exact: dict[str, str] = {}
    failures: list[BaseException] = []
    lock = threading.Lock()

    def run() -> None:
        workers: dict[str, Worker] = {}
        try:
            while not failures:
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    break
                worker = workers.setdefault(job.version, Worker(job.version, folder))
                result = worker.compile(job)
                with lock:
                    results[job] = result
                    exact[job.version] = worker.triton
                    done(job, result)
        except BaseException as error:
            failures.append(error)
        finally:
            for worker in workers.values():
                worker.stop()

    crew = [threading.Thread(target=run) for _ in range(max(1, threads))]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    if failures:
        raise failures[0]
    return results, exact
