"""Restoration on a GPU gives what the CPU gives, with every host, task and temporal part."""

from __future__ import annotations

import pytest
import torch
from networks import GuidedUNet
from restoration_models import SIZE, moving

import zsvr
from zsvr import metrics, planning, priors, schedule
from zsvr.flow import Flow, Zero
from zsvr.pipeline import open_job


class Prior(priors.Prior):
    """A network of guided-diffusion's structure with random weights, which needs no library."""

    channels, multiple, size = 3, 4, (SIZE, SIZE)

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = GuidedUNet().to(device).eval().requires_grad_(False)
        self.alphas_bar = schedule.alphas_bar(schedule.linear_betas())

    def predict(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, None]:
        return x + 0.1 * torch.nn.functional.interpolate(self.model(x), scale_factor=2.0), None

    def describe(self) -> dict[str, str]:
        return {"kind": "random"}


@pytest.fixture(params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda")


def known_flow(frames: int) -> Flow:
    """The flow of `moving`: two pixels to the left."""
    forward = torch.zeros(frames - 1, 2, SIZE, SIZE)
    forward[:, 0] = -2
    nothing = torch.zeros(frames - 1, SIZE, SIZE, dtype=torch.bool)
    cuts = torch.zeros(frames - 1, dtype=torch.bool)
    return Flow(forward, -forward, nothing, nothing.clone(), torch.zeros(frames - 1), cuts)


def restored(
    device: torch.device, task: str, host: str, changes: dict[str, object], **operator: object
) -> torch.Tensor:
    result = zsvr.restore(
        moving(3), prior=Prior(device), task=task, operator=operator, host=host, mode="synthetic", steps=5,
        noise_std=0.1 if host == "ddnm+" else 0.0, temporal=zsvr.Temporal.preset("paper", changes), flow=known_flow(3),
    )  # fmt: skip
    assert result.frames.device.type == "cpu" and torch.isfinite(result.frames).all()
    assert "4 of 4 attention layers patched" in result.patch
    return result.frames


CASES = [
    ("denoise", "ddnm+", {}, {}),
    ("sr", "ddnm", {"noise.sharing": "warp_blend"}, {"scale": 4}),
    ("sr_avg", "dps", {"guidance.target": "x", "attention.combine": "joint"}, {"scale": 2}),
    ("deblur", "gdp", {"noise.sharing": "static_mask", "attention.combine": "parallel"}, {"kernel": "motion"}),
    ("deblur", "ddnm+", {"guidance.norm": "charbonnier"}, {"kernel": "gaussian"}),
    ("inpaint", "ddnm", {"guidance.x0_blend": 0.5, "correct.similarity_start": 0.0}, {"ratio": 0.5}),
    ("colorize", "gdp", {"noise.sharing": "rho", "guidance.scale_by_variance": True}, {}),
    ("lowlight", "gdp", {"noise.sharing": "none"}, {"gain": 0.3}),
]


@pytest.mark.parametrize(("task", "host", "changes", "operator"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_every_task_gives_what_the_cpu_gives(place, task, host, changes, operator):
    out = restored(place, task, host, changes, **operator)
    again = restored(place, task, host, changes, **operator)
    assert torch.equal(out, again)
    if place.type == "cuda":
        # Five steps of a network whose convolutions round in another order, TF32 among them if torch allows it.
        expected = restored(torch.device("cpu"), task, host, changes, **operator)
        assert float((out - expected).abs().mean()) < 1e-2


def test_a_plan_names_the_memory_of_the_device(place):
    job = open_job(
        moving(3), prior=Prior(place), task="sr_avg", operator={"scale": 2}, mode="synthetic", steps=2,
        flow=known_flow(3),
    )  # fmt: skip
    plan = planning.plan(job)
    assert plan.needed_bytes > 0 and plan.frames_that_fit > 3 and place.type in str(plan)
    assert job.config["device"]["type"] == place.type


def test_metrics_are_those_of_the_cpu(place):
    output, reference = (0.9 * moving(3)).to(place), moving(3).to(place)
    flow = known_flow(3)
    found = metrics.evaluate(output, reference, flow=flow.to(place), estimator=Zero())
    expected = metrics.evaluate(output.cpu(), reference.cpu(), flow=flow, estimator=Zero())
    for name in ("psnr", "ssim", "we"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
