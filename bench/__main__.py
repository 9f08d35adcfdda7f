"""Measure everything and write ``bench/results/<device>/<date>-<commit>.json`` and its report.

``python -m bench [--quick | --smoke] [--select TEXT] [--threads N ...] [--allocator D R] [--out DIR]``

Each combination of allocator mode and number of threads is a process of its own (pytest with pytest-benchmark).
D is the default malloc, which gives large blocks back after every call and pays for fresh pages; R keeps them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench import provenance, report, shapes

ROOT = pathlib.Path(__file__).resolve().parents[1]
RETAINED = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "40000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
ALLOCATORS = {"R": RETAINED, "D": {}}


def environment(allocator: str, threads: int, cache: pathlib.Path) -> dict[str, str]:
    """Return the environment of a measuring process; compiled peers are shared between allocator modes."""
    base = {name: value for name, value in os.environ.items() if name not in RETAINED}
    return base | ALLOCATORS[allocator] | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / f"inductor-{threads}"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers that would wake up while we measure
    }  # fmt: skip


def measure(suite: str, allocator: str, threads: int, select: str, folder: pathlib.Path) -> dict[str, Any] | None:
    """Run one process and return what it recorded, or None if it had no case."""
    part = folder / f"{allocator}-{threads}.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-quiet",
               "--timeout=900", "-o", "filterwarnings=default", "-W", "ignore", "-o", "python_files=bench_*.py",
               "-o", "python_functions=bench_*", f"--suite={suite}", f"--threads={threads}",
               f"--select={select}", f"--part={part}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(allocator, threads, folder))
    if not part.exists():
        if done.returncode not in (0, 5):  # 5: no case collected
            raise SystemExit(f"the measuring process failed with exit status {done.returncode}")
        return None
    return {"allocator": allocator, **json.loads(part.read_text())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="suite", help="a minute or two")
    size.add_argument("--smoke", action="store_const", const="smoke", dest="suite", help="one tiny shape per operator")
    parser.add_argument(
        "--select",
        default="",
        help="only cases whose 'operator-name' contains this, or one of several texts, by commas",
    )
    parser.add_argument("--threads", type=int, nargs="+", help="default: those the suite asks for")
    parser.add_argument("--allocator", nargs="+", choices=tuple(ALLOCATORS), default=list(ALLOCATORS))
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results; default bench/results/<device>")
    options = parser.parse_args(arguments)
    suite = options.suite or "full"
    started, now = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    facts = provenance.collect(ROOT)
    runs = []
    with tempfile.TemporaryDirectory(prefix="zsvr-bench-") as folder:
        for threads in options.threads or shapes.thread_counts(suite):
            for allocator in options.allocator:
                print(f"== allocator {allocator}, {threads} thread(s)", flush=True)
                found = measure(suite, allocator, threads, options.select, pathlib.Path(folder))
                runs += [found] if found else []
    if not runs:
        raise SystemExit(f"no case matches {options.select!r}")
    seconds = round(time.monotonic() - started, 1)
    stamp = {
        "date": now.isoformat(timespec="seconds"),
        "suite": suite,
        "select": options.select,
        "seconds": seconds,
    }
    result = {"schema": 1, "provenance": stamp | facts, "runs": runs}
    target = options.out or ROOT / "bench" / "results" / facts["device_slug"]
    target.mkdir(parents=True, exist_ok=True)
    name = f"{now:%Y-%m-%d}-{facts['commit'][:10]}" + ("" if suite == "full" else f"-{suite}")
    name += f"-{re.sub('[^a-z0-9]+', '-', options.select.lower()).strip('-')[:24]}" if options.select else ""
    path = target / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    text = report.render(result, report.previous(path))
    path.with_suffix(".md").write_text(text)
    print(f"{text}\nwritten: {path} and .md, {seconds:.0f} s")
    return 1 if report.red(result) else 0


if __name__ == "__main__":
    raise SystemExit(main())
