"""One self-contained page about an evaluation: pictures inline, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kvferry.evaluation.results import SchemeResult
from kvferry.evaluation.retrieval import LEAST_GAIN, TASKS, RetrievalResult
from kvferry.evaluation.run import Evaluation, StudyResult

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; } p, li { max-width: 52rem; }
img { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid #888; font-weight: 600; vertical-align: bottom; white-space: pre-line; }
th:first-child, td:first-child { text-align: left; }
tr.family td { border-top: 1px solid #ddd; } tr.front td { background: #eef6ee; } tr.broken td { background: #fbdcdc; }
.kept { color: #1a6b2d; font-weight: 600; } .broken { color: #a40e0e; font-weight: 600; } .small { color: #666;
  font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; max-width: 50rem; }
"""

READING = (
    (
        "bits/value",
        "Bytes of everything that is needed to restore the cache, times 8, over the values. The cache itself has 16 "
        "(bfloat16, float16). K and V apart beside it; ratio is raw over encoded bytes. A profile is not counted: it "
        "is loaded once for a model.",
    ),
    (
        "KL",
        "How far the model's prediction of the next token moves: KL divergence from the untouched cache's to the "
        "restored cache's, in nats, for each scored token. The mean, and the 99th percentile, which one token in a "
        "hundred exceeds. 0 is perfect. Below the level where finer bounds stop helping, the figures show the rounding "
        "of the model's own arithmetic.",
    ),
    (
        "top-1, top-5",
        "Share of tokens after which both caches find the same next token most likely; share of the untouched cache's "
        "five most likely tokens that are among the restored cache's five.",
    ),
    ("perplexity", "Relative change on the text that follows. It may fall by chance; KL cannot be below 0."),
    (
        "drift",
        "Tokens that greedy generation shares with that from the untouched cache, before the first difference; mean "
        "over the texts, and the least. One close call is enough for a difference, so this says when texts part, not "
        "that one is worse, and it takes many texts to compare codecs by it.",
    ),
    (
        "error/bound",
        "Largest error of any value over the bound promised for it: at most 1. Lossless must be exact in every bit of "
        "the cache and of every logit. '-': nothing is promised.",
    ),
    ("green rows", "Nothing in the table has fewer bits and a lower mean KL."),
)

Cell = tuple[str, Callable[[SchemeResult], str]]
COLUMNS: tuple[Cell, ...] = (
    ("bits/\nvalue", lambda r: f"{r.bits_per_value:.2f}"),
    ("K", lambda r: f"{r.bits_k:.2f}"),
    ("V", lambda r: f"{r.bits_v:.2f}"),
    ("ratio", lambda r: f"{r.ratio:.2f}"),
    ("KL\nmean", lambda r: _small(r.kl_nats)),
    ("KL\np99", lambda r: _small(r.kl_p99)),
    ("top-1\nagree", lambda r: f"{100 * r.top1_agreement:.2f}%"),
    ("top-5\nagree", lambda r: f"{100 * r.top5_agreement:.2f}%"),
    ("perplexity", lambda r: f"{100 * r.perplexity_change:+.2f}%"),
)
DRIFT_COLUMN: Cell = ("drift\nmean (least)", lambda r: _drift(r))
BOUND_COLUMN: Cell = ("error/\nbound", lambda r: _bound(r))


def page(
    evaluation: Evaluation, pictures: Mapping[str, bytes], machine: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """The page. `pictures`: PNG files by the names of `output.draw`."""
    model = evaluation.model
    parts = [
        f"<h1>KV cache codecs on {escape(model['name'])}</h1>",
        f"<p class=small>{escape(model['architecture'])}, {model['parameters'] / 1e6:.1f}M parameters, "
        f"{model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}, {escape(model['dtype'])}</p>",
        _verdict(evaluation),
        "<h2>What was done</h2>",
        _protocol(evaluation),
        "<h2>Rate and distortion</h2>",
        "<p>Left is smaller, down is closer to the untouched cache: a line below and to the left of another is the "
        "better codec. Points are labelled with their setting.</p>",
        *(_picture(pictures, name) for name in ("rate-kl", "rate-kl-p99", "rate-top1")),
        "<h2>All codecs</h2>",
        _results_table(evaluation.results, drift=bool(evaluation.plan.protocol.generate)),
        "<h3>How to read it</h3>",
        "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in READING) + "</dl>",
    ]
    if "rate-drift" in pictures:
        parts += ["<h2>Greedy drift</h2>", _picture(pictures, "rate-drift")]
    if evaluation.retrieval:
        parts += ["<h2>Long-range retrieval</h2>", _retrieval(evaluation)]
    if evaluation.sensitivity:
        parts += ["<h2>Layers, K and V</h2>", _sensitivity(evaluation, pictures)]
    if evaluation.studies:
        parts += ["<h2>Studies</h2>", *(_study(study, pictures) for study in evaluation.studies)]
    parts += ["<h2>Machine and versions</h2>", _facts({**machine, **versions})]
    title = f"KV cache codecs on {escape(model['name'])}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


def pareto_front(results: Sequence[SchemeResult]) -> set[str]:
    """Names of the results that no other one beats in bits per value and mean KL at once."""
    return {
        mine.name
        for mine in results
        if not any(
            other.bits_per_value <= mine.bits_per_value
            and other.kl_nats <= mine.kl_nats
            and (other.bits_per_value, other.kl_nats) != (mine.bits_per_value, mine.kl_nats)
            for other in results
        )
    }


def _verdict(evaluation: Evaluation) -> str:
    if evaluation.broken:
        return f"<p class=broken>Guarantees broken: {escape(', '.join(evaluation.broken))}</p>"
    return "<p class=kept>Every guarantee held: no value beyond its bound, lossless codecs bit for bit.</p>"


def _protocol(evaluation: Evaluation) -> str:
    plan, text = evaluation.plan, evaluation.text
    protocol = plan.protocol
    sentences = [
        f"Each of {plan.sequences} texts' first {protocol.prefix} tokens are run through the model. Their KV cache is "
        "encoded to bytes by each codec, kept in a store, decoded, and put back. The model then reads the next "
        f"{protocol.score} tokens once with the untouched cache and once with the restored one, and what it predicts "
        "after each of them is compared. Errors in the prefix are all there is: the scored tokens' own KV is exact."
    ]
    if protocol.generate:
        sentences.append(f"{protocol.generate} tokens are generated greedily from both caches.")
    sentences.append(
        f"The text is {text['name']} ({text['tokens']} tokens in {text['documents']} documents, digest "
        f"{text['digest'][:12]}). Baselines (fp8, int, KIVI-style, Hadamard) go through the same store, as the bytes "
        "of their codes, scales and zeros. Small models tell codecs apart, but do not stand for larger ones."
    )
    sentences += evaluation.remarks
    if plan.profiles:
        names = ", ".join(f"{named.name} ({named.profile.digest[:12]})" for named in plan.profiles)
        sentences.append(f"Profiles: {names}. What they were calibrated on should be other text than this.")
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _results_table(results: Sequence[SchemeResult], *, drift: bool) -> str:
    columns = (*COLUMNS, *((DRIFT_COLUMN,) if drift else ()), BOUND_COLUMN)
    front, rows, family = pareto_front(results), [], None
    for result in results:
        classes = ["family"] if result.family != family else []
        family = result.family
        if not result.guarantee_kept:
            classes.append("broken")
        elif result.name in front:
            classes.append("front")
        rows.append((" ".join(classes), [result.name, *(cell(result) for _, cell in columns)]))
    return _table(["codec", *(heading for heading, _ in columns)], rows)


def _retrieval(evaluation: Evaluation) -> str:
    text = (
        f"<p>In the prefixes of {evaluation.plan.trials} texts, sentences with a number (needles) and a list of keys "
        "with values were planted, and then asked for. A small model may recall few of them in full with any cache: "
        "what counts is that the restored cache does as the untouched one. <em>Gain</em> is what the planted text is "
        "worth to the untouched cache, in nats per token of the answer, against the same prefix without it; "
        "<em>gain kept</em> is how much of that the restored cache still has (it may exceed 100% by chance, and is "
        f"left out where the gain is below {LEAST_GAIN} nats: there is nothing to keep). <em>Agreement</em>: share of "
        "answer tokens where both caches find the same token most likely. <em>1/rank</em>: of the right token, mean. "
        "<em>Recall</em>: share of answers right in every token.</p>"
    )
    return text + "".join(_retrieval_table(task, evaluation.retrieval) for task in TASKS)


def _retrieval_table(task: str, results: Sequence[RetrievalResult]) -> str:
    mine = [result for result in results if result.task == task]
    if not mine:
        return ""
    first = mine[0]
    facts = (
        f"<h3>{escape(task)}: {first.answers} questions</h3><p>Untouched cache: gain {first.gain:.2f} nats, "
        f"1/rank {first.rank_untouched:.3f}, recall {100 * first.recall_untouched:.0f}%.</p>"
    )
    rows = [
        (
            "",
            [
                result.name,
                "-" if result.gain_kept is None else f"{100 * result.gain_kept:.1f}%",
                f"{100 * result.agreement:.1f}%",
                _small(result.kl_nats),
                f"{result.nll_restored - result.nll_untouched:+.4f}",
                f"{result.rank_restored:.3f}",
                f"{100 * result.recall_restored:.0f}%",
            ],
        )
        for result in mine
    ]
    headings = ["codec", "gain\nkept", "agreement", "KL", "answer's\nnats/token", "1/rank", "recall"]
    return facts + _table(headings, rows)


def _sensitivity(evaluation: Evaluation, pictures: Mapping[str, bytes]) -> str:
    text = (
        "<p>One layer's K or V alone goes through the codec; all else is untouched. High bars are where bits are spent "
        "best. The relative error beside the KL (root mean square, over the deviation of each channel) tells whether a "
        "layer is sensitive or was just coded badly.</p>"
    )
    rows: list[tuple[str, list[str]]] = []
    results = evaluation.sensitivity
    for name in dict.fromkeys(result.name for result in results):
        ranked = sorted((r for r in results if r.name == name), key=lambda result: -result.kl_nats)
        for place, result in enumerate(ranked[:8]):
            figures = [f"{result.relative_error:.3f}", _small(result.kl_nats), _small(result.kl_p99)]
            where = f"layer {result.layer} {result.side.upper()}"
            agree = f"{100 * result.top1_agreement:.2f}%"
            rows.append(("" if place else "family", [name, where, *figures, agree]))
    table = _table(["codec", "the most\nsensitive", "relative\nerror", "KL\nmean", "KL\np99", "top-1\nagree"], rows)
    return text + _picture(pictures, "sensitivity") + table


def _study(study: StudyResult, pictures: Mapping[str, bytes]) -> str:
    return (
        f"<h3>{escape(study.study.name)}</h3><p>{escape(study.study.question)}</p>"
        + _picture(pictures, f"study-{study.study.name}")
        + _results_table(study.results, drift=False)
    )


def _table(headings: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f'<tr class="{classes}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
        for classes, cells in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [("", [name, str(value)]) for name, value in facts.items()]
    return _table(["", ""], rows)


def _picture(pictures: Mapping[str, bytes], name: str) -> str:
    data = base64.b64encode(pictures[name]).decode("ascii")
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


def _small(value: float) -> str:
    """Three digits, however small."""
    return "0" if value == 0 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _drift(result: SchemeResult) -> str:
    return f"{result.drift_mean:.1f} ({min(result.drift_tokens)})" if result.drift_mean is not None else "-"


def _bound(result: SchemeResult) -> str:
    if result.guarantee == "exact":
        return "exact" if result.guarantee_kept else "NOT EXACT"
    return "-" if result.error_over_bound is None else f"{result.error_over_bound:.3f}"
