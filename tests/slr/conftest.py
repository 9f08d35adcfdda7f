"""Which implementation of the correspondence search the contexts of these tests use."""

from __future__ import annotations

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import backends

SEARCHES = ("correspondence_search", "link_score")


def refusal() -> str | None:
    f = torch.ones(1, 1, 8)
    try:
        zk.correspondence_search(f, f, torch.zeros(1, 1, 2, dtype=torch.int32), grid=(1, 1), radius=0)
        zk.link_score(f, f, torch.zeros(1, 1, 2), grid=(1, 1))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.fixture(params=["reference", "auto"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the search by the reference, and by what "auto" chooses where that can run."""
    if request.param == "reference":
        for op in SEARCHES:
            monkeypatch.setitem(backends.PREFERENCE, (op, "cpu"), ("reference",))
    elif (reason := refusal()) is not None:
        pytest.skip(f"the compiled search cannot run: {reason}")
    return request.param
