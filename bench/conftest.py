"""Options and fixtures of the measuring run; `python -m bench` is what calls pytest with them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from bench import contest, probes, shapes

BUDGETS = {
    "full": contest.Budget(seconds=5.0, least=3, most=30),
    "quick": contest.Budget(seconds=1.5, least=3, most=10),
    "smoke": contest.Budget(seconds=0.2, least=3, most=5),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zsvr")
    group.addoption("--suite", choices=tuple(shapes.SUITES), default="full")
    group.addoption("--threads", type=int, default=1, help="torch's number of threads")
    group.addoption("--select", default="", help="only cases whose name contains this")
    group.addoption("--part", help="file that receives probes and records as JSON")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[RECORDS] = []


RECORDS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    op = metafunc.module.OP
    found = shapes.cases(option("--suite"), op, option("--threads"), option("--select"))
    metafunc.parametrize("case", found, ids=[case.name for case in found])


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any):
    """Run a case, keep its record, and fail if its check is red."""

    def run(case: shapes.Case) -> None:
        record = contest.run(case, benchmark, BUDGETS[request.config.getoption("--suite")])
        request.config.stash[RECORDS].append(record)
        if not record["check"]["ok"]:
            pytest.fail(record["check"]["message"], pytrace=False)

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    part = session.config.getoption("--part")
    records = session.config.stash[RECORDS]
    if not part or not records:
        return
    small = session.config.getoption("--suite") == "smoke"
    ceilings = probes.measure(seconds=0.05 if small else 0.4, dram=not small)
    threads = torch.get_num_threads()
    pathlib.Path(part).write_text(json.dumps({"threads": threads, "probes": ceilings, "cases": records}))
