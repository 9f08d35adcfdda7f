"""Optical flow of a clip: estimators, the forward-backward check, cuts, files."""

from zsvr.flow.cache import cached, identify, load, save
from zsvr.flow.estimators import DIS, RAFT, Estimator, Given, Zero, estimator
from zsvr.flow.fields import EstimationOptions, Flow, estimate
from zsvr.flow.flo import read_flo, write_flo, write_flow

__all__ = [
    "DIS",
    "RAFT",
    "EstimationOptions",
    "Estimator",
    "Flow",
    "Given",
    "Zero",
    "cached",
    "estimate",
    "estimator",
    "identify",
    "load",
    "read_flo",
    "save",
    "write_flo",
    "write_flow",
]
