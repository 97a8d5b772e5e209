"""Deciding how many replicas the KV cache needs; pure, driven by octavo_operator.scaler."""

from octavo_operator.autoscale.decide import Decision, History, Inputs, decide, kv_percent
from octavo_operator.autoscale.samples import Failure, Load, LoadError, Sample, parse_load

__all__ = [
    "Decision",
    "Failure",
    "History",
    "Inputs",
    "Load",
    "LoadError",
    "Sample",
    "decide",
    "kv_percent",
    "parse_load",
]
