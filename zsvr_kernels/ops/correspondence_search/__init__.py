"""Correspondence search by cosine similarity; README.md beside this file has the definition and the limits."""

from zsvr_kernels.ops.correspondence_search.api import correspondence_search, link_score
from zsvr_kernels.ops.correspondence_search.reference import correspondence_search_reference, link_score_reference

__all__ = ["correspondence_search", "correspondence_search_reference", "link_score", "link_score_reference"]
