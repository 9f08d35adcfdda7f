"""Chaining of links into trajectories; README.md beside this file has the definition and the limits."""

from zsvr_kernels.ops.chain_links.api import chain_links
from zsvr_kernels.ops.chain_links.reference import chain_links_reference

__all__ = ["chain_links", "chain_links_reference"]
