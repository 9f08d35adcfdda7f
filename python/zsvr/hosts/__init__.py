"""Hosts: zero-shot restoration methods for images, one step at a time."""

from zsvr.hosts.base import Host, Step
from zsvr.hosts.registry import REGISTRY, choose, make

__all__ = ["REGISTRY", "Host", "Step", "choose", "make"]
