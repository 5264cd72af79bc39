"""Which codec a layer's K or V gets: constant, by a profile, or adaptive at run time within the user's limits."""

from kvferry.policy.adaptive import Adaptive, AdaptiveStats
from kvferry.policy.choice import CodecChoice, KOrV, Policy, check_choice, choose
from kvferry.policy.fixed import ByProfile, Constant

__all__ = [
    "Adaptive",
    "AdaptiveStats",
    "ByProfile",
    "CodecChoice",
    "Constant",
    "KOrV",
    "Policy",
    "check_choice",
    "choose",
]
