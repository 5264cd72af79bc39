"""A calibration from model and text to a certified profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvferry
from kvferry.calibration.basis import deviations, heads_of_a_group, profile_of
from kvferry.calibration.certificate import certified_profile
from kvferry.calibration.held_out import HeldOut
from kvferry.calibration.identity import CacheShape, cache_shape, model_identity, probe_cache
from kvferry.calibration.moments import Moments
from kvferry.calibration.settings import Report, Settings
from kvferry.calibration.state import StateFile
from kvferry.calibration.steps import equal_steps, probe_layer
from kvferry.calibration.windows import digest, split_text
from kvferry.codecs.transform.profile import Profile
from kvferry.codecs.transform.rope import Rope
from kvferry.evaluation import prefill


def calibrate(
    model: Any,
    documents: Sequence[Tensor],
    settings: Settings,
    *,
    name: str = "",
    text: str = "",
    state: Path | None = None,
    fresh: bool = False,
    report: Report = lambda stage, done, total, remark: None,
) -> Profile:
    """Calibrate `model` (a transformers causal model in bfloat16 or float16) on `documents`, int64 `[tokens]` each.

    `name` and `text` are what the profile calls model and text. With `state`, a file there is gone on from (unless
    `fresh`) and kept up to date while means, bases and sensitivities are measured; it is removed at the end. Needs
    memory for one window on the model's device, and in host memory for the held-out windows' caches and logits and for
    `layers * 2 * groups * n**2` float64. Raises `ValueError` for models, texts, states and targets that do not fit.
    """
    windows = split_text(documents, settings.protocol.window, settings.windows, settings.held_out)
    _check_context(model, settings)
    shape, rope = probe_cache(model, int(windows.moments[0, 0]), settings.rope)
    if shape.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the cache is {shape.dtype}: load the model in bfloat16 or float16 (--dtype)")
    group_heads = heads_of_a_group(shape.heads, shape.head_dim, settings.scope)
    identity = model_identity(model, name, shape)
    known = {key: identity[key] for key in identity if key != "name"} | {
        "version": 1,
        "rope": asdict(rope),
        "group_heads": group_heads,
        "window_tokens": settings.window_tokens,
        "moment_windows": [settings.windows, digest(windows.moments)],
        "held_out_windows": [settings.held_out, digest(windows.held_out)],
    }
    file = StateFile(state, known) if state else None
    resumed = file.load() if file and not fresh else None
    moments, probes = _from_tensors(resumed, shape, group_heads)
    _sum_moments(model, moments, windows.moments[:, :-1], rope, file, report)
    report("bases", 0, 0, "")
    profile = profile_of(moments, shape.heads, shape.head_dim, rope)
    held_out = HeldOut(model, windows.held_out, settings.protocol.prefix)
    found = deviations(moments)
    while len(probes) < shape.layers:
        report("sensitivities", len(probes), shape.layers, "")
        probes.append(probe_layer(held_out, profile, found, len(probes)))
        if file and (file.due or len(probes) == shape.layers):
            file.save(_as_tensors(moments, probes))
    report("sensitivities", shape.layers, shape.layers, "")
    profile = replace(profile.with_steps(equal_steps(found, probes)), model=identity)
    certified = certified_profile(
        model, settings, windows, held_out, profile, report,
        {
            "text": {"name": text, "tokens": sum(map(len, documents)), "digest": digest(*documents)},
            "moments": {"windows": settings.windows, "window_tokens": settings.window_tokens},
            "sensitivities": probes,
            "device": held_out.device.type,
            "kvferry": kvferry.__version__,
            "torch": torch.__version__,
        },
    )  # fmt: skip
    if file:
        file.remove()
    return certified


def _check_context(model: Any, settings: Settings) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and settings.window_tokens > context:
        raise ValueError(
            f"windows of {settings.window_tokens} tokens exceed the model's context of {context}: "
            "give smaller --window-tokens"
        )


def _as_tensors(moments: Moments, probes: list[tuple[float, float]]) -> dict[str, Tensor]:
    """What the state file holds."""
    return {
        "sums": moments.sums,
        "products": moments.products,
        "tokens": torch.tensor(moments.tokens),
        "sensitivities": torch.tensor(probes, dtype=torch.float64).reshape(-1, 2),
    }


def _from_tensors(
    tensors: dict[str, Tensor] | None, shape: CacheShape, group_heads: int
) -> tuple[Moments, list[tuple[float, float]]]:
    """Undo `_as_tensors`; zeros for None."""
    if tensors is None:
        return Moments.zeros(shape.layers, shape.heads // group_heads, group_heads * shape.head_dim), []
    moments = Moments(tensors["sums"], tensors["products"], int(tensors["tokens"]))
    return moments, [(k, v) for k, v in tensors["sensitivities"].tolist()]


def _sum_moments(
    model: Any, moments: Moments, windows: Tensor, rope: Rope, file: StateFile | None, report: Report
) -> None:
    """Add the windows that `moments` do not have yet."""
    count, length = windows.shape
    device = next(model.parameters()).device
    for number in range(moments.tokens // length, count):
        report("moments", number, count, "")
        cache = prefill(model, windows[None, number].to(device))
        cache_shape(cache, length)
        moments.add(cache, rope)
        if file and (file.due or number == count - 1):
            file.save(_as_tensors(moments, []))
    report("moments", count, count, "")
