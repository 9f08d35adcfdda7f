"""Which implementation of the search the contexts of these tests use, and a counter of what they build."""

from __future__ import annotations

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import backends
from zsvr_kernels import context as context_module

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


class Counter:
    """Counts what a context builds."""

    def __init__(self, monkeypatch):
        self.links, self.chains, self.corrections = 0, 0, 0
        build, chain, correct = zk.Links.from_flow, context_module.chain_links, context_module.correct_links

        def from_flow(*arguments, **keywords):
            self.links += 1
            return build(*arguments, **keywords)

        def chain_links(*arguments, **keywords):
            self.chains += 1
            return chain(*arguments, **keywords)

        def correct_links(*arguments, **keywords):
            self.corrections += 1
            return correct(*arguments, **keywords)

        monkeypatch.setattr(zk.Links, "from_flow", from_flow)
        monkeypatch.setattr(context_module, "chain_links", chain_links)
        monkeypatch.setattr(context_module, "correct_links", correct_links)

    def take(self):
        counts = self.links, self.chains, self.corrections
        self.links = self.chains = self.corrections = 0
        return counts


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)
