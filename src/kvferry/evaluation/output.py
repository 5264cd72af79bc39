"""An evaluation as files: JSON with everything, CSV tables, PNG plots, and one HTML page with all of it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvferry.evaluation import plots
from kvferry.evaluation.html import page
from kvferry.evaluation.results import SchemeResult
from kvferry.evaluation.retrieval import RetrievalResult
from kvferry.evaluation.run import Evaluation

UNITS = {
    "ratio": "raw bytes / encoded bytes",
    "bits_per_value": "encoded bits / values; bits_k and bits_v: of K and V alone",
    "kl_nats": "KL(untouched || restored), nats/token, mean; kl_p99: 99th percentile",
    "gbps": "1e9 raw bytes per second",
    "drift_tokens": "greedy tokens until the first difference, one number a sequence",
    "nll": "nats/token",
}


def write_all(folder: Path, evaluation: Evaluation, machine: Mapping[str, Any], versions: Mapping[str, str]) -> Path:
    """Write every file into `folder` (made if it is not there) and return the page's path.

    Raises `OSError` where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = to_json(evaluation, machine, versions)
    (folder / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, rows in tables(evaluation).items():
        write_csv(folder / f"{name}.csv", rows)
    pictures = draw(evaluation)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    path = folder / "evaluation.html"
    path.write_text(page(evaluation, pictures, machine, versions), encoding="utf-8")
    return path


def to_json(evaluation: Evaluation, machine: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """Everything, as plain values. Numbers that are not finite are written as their names: JSON has none."""
    plan = evaluation.plan
    profiles = [
        {"name": named.name, "digest": named.profile.digest, "group_heads": named.profile.group_heads}
        for named in plan.profiles
    ]
    whole = {
        "protocol": asdict(plan.protocol) | {"sequences": plan.sequences, "retrieval_trials": plan.trials},
        "model": evaluation.model,
        "text": evaluation.text,
        "profiles": profiles,
        "machine": dict(machine),
        "versions": dict(versions),
        "units": UNITS,
        "remarks": evaluation.remarks,
        "results": [scheme_row(result) for result in evaluation.results],
        "retrieval": [_retrieval_row(result) for result in evaluation.retrieval],
        "sensitivity": [asdict(result) for result in evaluation.sensitivity],
        "studies": [
            {
                "name": study.study.name,
                "question": study.study.question,
                "results": [scheme_row(result) for result in study.results],
            }
            for study in evaluation.studies
        ],
    }
    plain: dict[str, Any] = _plain(whole)
    return plain


def tables(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """The CSV files' names without ending, and their rows; none for what was not measured."""
    studies = [
        {"study": study.study.name} | scheme_row(result) for study in evaluation.studies for result in study.results
    ]
    found = {
        "evaluation": [scheme_row(result) for result in evaluation.results],
        "retrieval": [_retrieval_row(result) for result in evaluation.retrieval],
        "sensitivity": [asdict(result) for result in evaluation.sensitivity],
        "studies": studies,
    }
    return {name: rows for name, rows in found.items() if rows}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the first one's keys as header. Lists are written with spaces between, None as nothing."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in row.items()})


def draw(evaluation: Evaluation) -> dict[str, bytes]:
    """The PNG files' names without ending, and the pictures."""
    results = evaluation.results
    about = f"{evaluation.model['name']}, {evaluation.plan.protocol.prefix} tokens restored"
    pictures = {
        "rate-kl": plots.rate_distortion(results, plots.KL, f"{about}: mean KL"),
        "rate-kl-p99": plots.rate_distortion(results, plots.KL_P99, f"{about}: the worst hundredth of tokens"),
        "rate-top1": plots.rate_distortion(results, plots.DISAGREEMENT, f"{about}: next token"),
    }
    if evaluation.plan.protocol.generate:
        limit = evaluation.plan.protocol.generate
        pictures["rate-drift"] = plots.rate_distortion(results, plots.DRIFT, f"{about}: drift within {limit} tokens")
    if evaluation.sensitivity:
        pictures["sensitivity"] = plots.sensitivity(evaluation.sensitivity, f"{about}: one layer's K or V at a time")
    for study in evaluation.studies:
        title = f"{study.study.name}: mean KL"
        pictures[f"study-{study.study.name}"] = plots.rate_distortion(study.results, plots.KL, title, (8.5, 4.0))
    return pictures


def scheme_row(result: SchemeResult) -> dict[str, Any]:
    """All figures of a result, those that follow from others too."""
    extra = ("ratio", "bits_per_value", "perplexity_change", "drift_mean", "guarantee_kept")
    return asdict(result) | {name: getattr(result, name) for name in extra}


def _retrieval_row(result: RetrievalResult) -> dict[str, Any]:
    return asdict(result) | {"gain": result.gain, "gain_kept": result.gain_kept}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
