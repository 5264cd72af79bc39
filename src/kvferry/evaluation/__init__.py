"""What a codec does to a model: restore a prefix from its encoded KV cache, score the tokens after it, compare."""

from kvferry.evaluation.drift import continue_greedily
from kvferry.evaluation.prefix import (
    PrefixProtocol,
    evaluate_prefix,
    one_cpu_thread,
    prefill,
    spread_windows,
)
from kvferry.evaluation.results import SchemeResult
from kvferry.evaluation.schemes import CodecScheme, Guarantee, Scheme, default_schemes

__all__ = [
    "CodecScheme",
    "Guarantee",
    "PrefixProtocol",
    "Scheme",
    "SchemeResult",
    "continue_greedily",
    "default_schemes",
    "evaluate_prefix",
    "one_cpu_thread",
    "prefill",
    "spread_windows",
]
