"""Retrieval: what is planted where, and what is made of the answers, on the model that ships with kvferry."""

import copy

import pytest
import torch

from kvferry.evaluation import prefill, spread_windows
from kvferry.evaluation.codec_names import parse_codecs
from kvferry.evaluation.retrieval import DEPTHS, NEEDLE, PAIRS, RetrievalResult, evaluate_retrieval, make_trials
from kvferry.store import HostStore

PREFIX = 480


@pytest.fixture(scope="module")
def trials(demo_source):
    return make_trials(demo_source.tokenizer, spread_windows(demo_source.documents, PREFIX, 1), PREFIX)


@pytest.fixture(scope="module")
def results(demo_source, trials):
    schemes = parse_codecs(["lossless", "int2"])
    return evaluate_retrieval(demo_source.model, trials, schemes)


def occurrences(hay, needle):
    windows = hay.unfold(0, len(needle), 1)
    return (windows == needle).all(1).nonzero()[:, 0].tolist()


def test_answers_are_planted_once_behind_their_cues(trials):
    (trial,) = trials
    assert len(trial.planted) == len(trial.plain) == PREFIX
    assert [question.task for question in trial.questions] == 3 * [NEEDLE] + 4 * [PAIRS]
    for question in trial.questions:
        assert len(occurrences(trial.planted, torch.cat((question.cue, question.answer)))) == 1
        assert occurrences(trial.plain, question.cue) == []
    needles = [occurrences(trial.planted, question.cue)[0] for question in trial.questions[:3]]
    assert needles == [int(depth * PREFIX) for depth in DEPTHS]
    same = trial.planted == trial.plain
    assert 0.3 < float(same.float().mean()) < 0.9


def test_trials_differ_and_repeat(demo_source):
    windows = spread_windows(demo_source.documents, PREFIX, 2)
    first, again = (make_trials(demo_source.tokenizer, windows, PREFIX) for _ in range(2))
    assert torch.equal(first[1].planted, again[1].planted)
    cues = [demo_source.tokenizer.decode(trial.questions[0].cue) for trial in first]
    assert cues[0] != cues[1]
    assert cues[0].startswith("\nThe secret number of ")


def test_a_short_prefix_is_refused(demo_source):
    with pytest.raises(ValueError, match=r"prefix of 100 tokens has no room .* --trials 0"):
        make_trials(demo_source.tokenizer, spread_windows(demo_source.documents, 100, 1), 100)


def test_lossless_answers_as_the_untouched_cache(results):
    exact = [result for result in results if result.name == "lossless"]
    assert [result.task for result in exact] == [NEEDLE, PAIRS]
    assert [result.answers for result in exact] == [3, 4]
    for result in exact:
        assert (result.agreement, result.kl_nats) == (1, 0)
        assert result.nll_restored == result.nll_untouched
        assert result.rank_restored == result.rank_untouched
        assert result.recall_restored == result.recall_untouched
        assert result.gain_kept in (None, 1)


def test_a_coarse_cache_forgets(results):
    coarse = [result for result in results if result.name == "int2"]
    for result in coarse:
        assert result.kl_nats > 0.05
        assert result.agreement < 1


def test_figures_are_those_of_plain_formulas(demo_source, trials, results):
    model, (trial,) = demo_source.model, trials
    scheme = parse_codecs(["int2"])[0]
    cache, store = prefill(model, trial.planted[None]), HostStore(1 << 24)
    scheme.store(store, "a", cache)
    restored, plain = scheme.restore(store, "a", None), prefill(model, trial.plain[None])
    nll = {}
    for name, each in (("absent", plain), ("untouched", cache), ("restored", restored)):
        found, tokens = 0.0, 0
        for question in trial.questions[:3]:
            ids = torch.cat((question.cue, question.answer))
            with torch.no_grad():
                logits = model(input_ids=ids[None], past_key_values=copy.deepcopy(each)).logits[0].double()
            for position in range(len(question.cue), len(ids)):
                found -= float(logits[position - 1].log_softmax(-1)[ids[position]])
                tokens += 1
        nll[name] = found / tokens
    result = next(result for result in results if (result.name, result.task) == ("int2", NEEDLE))
    # One more token is fed here, which may change how sums are rounded.
    assert result.nll_absent == pytest.approx(nll["absent"], abs=0.05)
    assert result.nll_untouched == pytest.approx(nll["untouched"], abs=0.05)
    assert result.nll_restored == pytest.approx(nll["restored"], abs=0.05)
    assert result.gain == pytest.approx(nll["absent"] - nll["untouched"], abs=0.1)


def test_no_gain_has_nothing_to_keep():
    shared = {"answers": 1, "tokens": 1, "agreement": 1.0, "kl_nats": 0.0, "recall_untouched": 0.0}
    shared |= {"recall_restored": 0.0, "rank_untouched": 0.1, "rank_restored": 0.1}
    none = RetrievalResult("a", NEEDLE, **shared, nll_absent=3.0, nll_untouched=2.8, nll_restored=2.9)
    assert none.gain_kept is None
    half = RetrievalResult("a", NEEDLE, **shared, nll_absent=3.0, nll_untouched=1.0, nll_restored=2.0)
    assert half.gain_kept == 0.5
