"""A whole evaluation: every scheme under the prefix protocol, retrieval, sensitivity and the studies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvferry.codecs.transform.rope import Rope
from kvferry.evaluation.ablations import Study, choose_studies
from kvferry.evaluation.codec_names import DEFAULT, NamedProfile, parse_codecs
from kvferry.evaluation.coders import CoderScheme
from kvferry.evaluation.prefix import PrefixProtocol, evaluate_prefix, spread_windows
from kvferry.evaluation.results import SchemeResult
from kvferry.evaluation.retrieval import RetrievalResult, evaluate_retrieval, make_trials
from kvferry.evaluation.schemes import Scheme
from kvferry.evaluation.sensitivity import SIDES, SensitivityResult, evaluate_sensitivity
from kvferry.evaluation.source import ModelSource

Progress = Callable[[str, int, int, str], None]
"""Called with the stage, steps done, steps in all, and what comes next."""


@dataclass(frozen=True)
class Plan:
    """What to evaluate. `codecs` and `sensitivity` are names as in `codec_names.GRAMMAR`; `studies` of `ablations`.

    `trials` prefixes are used for retrieval (0: none), `sequences` windows for all else. Raises `ValueError` for
    names that are none, and for numbers below 0 (`sequences`: 1).
    """

    protocol: PrefixProtocol
    sequences: int = 2
    codecs: Sequence[str] = DEFAULT
    profiles: Sequence[NamedProfile] = ()
    sensitivity: Sequence[str] = ()
    studies: Sequence[str] = ()
    trials: int = 2

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences is {self.sequences}: give at least 1")
        if self.trials < 0:
            raise ValueError(f"trials is {self.trials}: give 0 or more")
        self.schemes(self.codecs), self.schemes(self.sensitivity)
        for study in self.chosen_studies:
            self.schemes(study.codecs)

    def schemes(self, names: Sequence[str]) -> list[CoderScheme]:
        """What `names` stand for, with the plan's profiles; each once."""
        return parse_codecs(list(dict.fromkeys(names)), self.profiles)

    @property
    def chosen_studies(self) -> list[Study]:
        """Those of the names in `studies`."""
        return choose_studies(self.studies, with_profile=bool(self.profiles))


@dataclass(frozen=True)
class StudyResult:
    """A study and the results of its codecs, in their order."""

    study: Study
    results: list[SchemeResult]


@dataclass(frozen=True)
class Evaluation:
    """All results of a `Plan` and what they were measured on."""

    plan: Plan
    model: dict[str, Any]
    text: dict[str, Any]
    results: list[SchemeResult]
    retrieval: list[RetrievalResult] = field(default_factory=list)
    sensitivity: list[SensitivityResult] = field(default_factory=list)
    studies: list[StudyResult] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what was left out, and why

    @property
    def all_results(self) -> list[SchemeResult]:
        """Those of the studies too, each once."""
        found = {result.name: result for study in self.studies for result in study.results}
        return list((found | {result.name: result for result in self.results}).values())

    @property
    def broken(self) -> list[str]:
        """The schemes whose guarantee did not hold."""
        return [result.name for result in self.all_results if not result.guarantee_kept]


def evaluate(source: ModelSource, plan: Plan, progress: Progress = lambda stage, done, total, what: None) -> Evaluation:
    """Run `plan` on a model. Raises `ValueError` where the text, the context or the prefix is too short for it, and
    `ProfileMismatch` for a profile of another model."""
    source.check_context(plan.protocol)
    for named in plan.profiles:
        _check_profile(named, source)
    windows = spread_windows(source.documents, plan.protocol.window, plan.sequences)
    remarks = []
    trials = []
    if plan.trials and source.tokenizer is None:
        remarks.append("Retrieval was left out: it plants text, and the model's folder has no tokenizer.")
    elif plan.trials:
        # Other windows where there are any: the same text would tell less.
        hay = spread_windows(source.documents, plan.protocol.window, plan.sequences + plan.trials)[plan.sequences :]
        trials = make_trials(source.tokenizer, hay, plan.protocol.prefix)
    schemes: list[Scheme] = list(plan.schemes(plan.codecs))
    model, measured = source.model, _Stages(progress)
    results = evaluate_prefix(
        model, windows, schemes, plan.protocol, on_step=measured.stage("codecs", schemes, plan.sequences)
    )
    retrieval = evaluate_retrieval(model, trials, schemes, measured.stage("retrieval", schemes, len(trials)))
    tested: list[Scheme] = list(plan.schemes(plan.sensitivity))
    layers = source.config.num_hidden_layers
    steps = len(tested) * plan.sequences * layers * len(SIDES)
    done = itertools.count()
    sensitivity = evaluate_sensitivity(
        model,
        windows,
        tested,
        plan.protocol,
        lambda sequence, scheme, layer, side: progress(
            "sensitivity", next(done), steps, f"{scheme.name}, layer {layer} {side}"
        ),
    )
    known = {result.name: result for result in results}
    names = [name for study in plan.chosen_studies for name in study.codecs]
    missing: list[Scheme] = [scheme for scheme in plan.schemes(names) if scheme.name not in known]
    # Studies compare distortion; to generate for each would take longer than all else.
    for result in evaluate_prefix(
        model,
        windows,
        missing,
        replace(plan.protocol, generate=0),
        on_step=measured.stage("studies", missing, plan.sequences),
    ):
        known[result.name] = result
    studies = [
        StudyResult(study, [known[scheme.name] for scheme in plan.schemes(study.codecs)])
        for study in plan.chosen_studies
    ]
    return Evaluation(
        plan, source.describe(), source.describe_text(), results, retrieval, sensitivity, studies, remarks
    )


class _Stages:
    """Progress of stages that go through schemes for each sequence."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, schemes: Sequence[Scheme], sequences: int) -> Callable[[int, Scheme], None]:
        total = len(schemes) * sequences
        places = {scheme.name: index for index, scheme in enumerate(schemes)}

        def on_step(sequence: int, scheme: Scheme) -> None:
            done = sequence * len(schemes) + places[scheme.name]
            self._progress(name, done, total, f"text {sequence + 1}: {scheme.name}")

        return on_step


def _check_profile(named: NamedProfile, source: ModelSource) -> None:
    about, rope = source.describe(), None
    if named.profile.rope.rotary_dim:  # one that takes no rotation off fits any model
        rope = Rope.from_config(source.config)
    named.profile.check(layers=about["layers"], heads=about["kv_heads"], head_dim=about["head_dim"], rope=rope)
