"""What has been done so far, on disk: one file per step, written at once, so that a run may be cut anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import time
from typing import Any

Record = dict[str, Any]
SOURCES = ("zsvr_kernels", "bench", "tests", "csrc", "setup.py", "CMakeLists.txt")
SUFFIXES = (".py", ".cpp", ".h", ".txt")
BUILT = "_native_build.txt"  # written by a build that failed, after which a run must still go on


def source_hash(root: pathlib.Path) -> str:
    """Return a short hash of everything that is measured, for trees with and without a commit."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in SUFFIXES and path.name != BUILT and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write(path: pathlib.Path, text: str) -> None:
    """Write a file so that a reader, or a next run, sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)


class Deadline:
    """A moment after which no step begins.

    Args:
        stop: in seconds since the epoch.
    """

    def __init__(self, stop: float) -> None:
        self.stop = stop

    def left(self) -> float:
        return self.stop - time.time()


class State:
    """Records of finished steps in a folder. One of another source, device or version counts as not there.

    Args:
        folder: where they are kept.
        fingerprint: what the records must have been made with.
    """

    def __init__(self, folder: pathlib.Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / (re.sub(r"[^A-Za-z0-9_.]+", "-", name) + ".json")

    def get(self, name: str) -> Record | None:
        """Return the record of a finished step, or None."""
        try:
            record = json.loads(self._path(name).read_text())
        except (OSError, ValueError):
            return None
        return record if record.get("fingerprint") == self.fingerprint else None

    def keep(self, name: str, kind: str, status: str, seconds: float, **fields: Any) -> None:
        """Keep a step's record. Status: ``"done"``, ``"failed"`` or ``"skipped"``."""
        record = {"name": name, "kind": kind, "status": status, "seconds": round(seconds, 3), **fields}
        write(self._path(name), json.dumps(record | {"fingerprint": self.fingerprint}, indent=1) + "\n")

    def forget(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def began(self) -> float:
        """Return when the first run of this fingerprint began, so that all of them write one result."""
        record = self.get("began")
        if record is None:
            self.keep("began", "began", "done", 0.0, at=time.time())
            record = self.get("began")
        assert record is not None
        return float(record["at"])

    # The step that a worker is in; it survives the worker.

    def enter(self, name: str) -> None:
        write(self.folder / "running", json.dumps({"name": name, "at": time.time()}))

    def leave(self) -> None:
        (self.folder / "running").unlink(missing_ok=True)

    def running(self) -> tuple[str, float] | None:
        """Return the name of the step in progress and since when, or None."""
        try:
            entry = json.loads((self.folder / "running").read_text())
        except (OSError, ValueError):
            return None
        return entry["name"], entry["at"]
