"""What makes frames agree over time beside attention: consistency guidance, and the settings of all temporal parts."""

from zsvr.temporal.guidance import ConsistencyGuidance
from zsvr.temporal.settings import FlowOptions, GuidanceOptions, NoiseOptions, Temporal, presets

__all__ = ["ConsistencyGuidance", "FlowOptions", "GuidanceOptions", "NoiseOptions", "Temporal", "presets"]
