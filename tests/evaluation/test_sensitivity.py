"""Sensitivity: one tensor at a time, against caches put together by hand."""

import copy

import pytest
import torch

from kvferry.evaluation import PrefixProtocol, prefill, spread_windows
from kvferry.evaluation.codec_names import parse_codecs
from kvferry.evaluation.sensitivity import evaluate_sensitivity
from kvferry.store import HostStore

PROTOCOL = PrefixProtocol(64, 24)


@pytest.fixture(scope="module")
def windows(demo_source):
    return spread_windows(demo_source.documents, PROTOCOL.window, 2)


def test_each_layer_and_side_is_scored_alone(demo_source, windows):
    schemes, steps = parse_codecs(["int2", "raw"]), []
    results = evaluate_sensitivity(demo_source.model, windows, schemes, PROTOCOL, lambda *step: steps.append(step))
    places = [(layer, side) for layer in range(4) for side in "kv"]
    assert [(r.name, r.layer, r.side) for r in results] == [(s.name, *place) for s in schemes for place in places]
    assert len(steps) == 2 * len(results)
    for result in results:
        if result.name == "raw":
            assert (result.kl_nats, result.kl_p99, result.top1_agreement, result.relative_error) == (0, 0, 1, 0)
        else:
            assert result.kl_p99 > result.kl_nats > 0
            assert 0.1 < result.relative_error < 2


def test_figures_are_those_of_a_cache_put_together_by_hand(demo_source, windows):
    model, (scheme,) = demo_source.model, parse_codecs(["int2"])
    results = evaluate_sensitivity(model, windows[:1], [scheme], PROTOCOL)
    cache, store = prefill(model, windows[:1, :64]), HostStore(1 << 22)
    scheme.store(store, "a", cache)
    mixed = copy.deepcopy(cache)
    mixed.layers[2].values = scheme.restore(store, "a", None).layers[2].values
    x, error = cache.layers[2].values.double(), (mixed.layers[2].values - cache.layers[2].values).double()
    ids = windows[:1, 64:88]
    with torch.no_grad():
        p = model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits[0].double().log_softmax(-1)
        q = model(input_ids=ids, past_key_values=mixed).logits[0].double().log_softmax(-1)
    result = next(result for result in results if (result.layer, result.side) == (2, "v"))
    assert result.kl_nats == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    spread = (x - x.mean(-2, keepdim=True)).square().mean()
    assert result.relative_error == pytest.approx(float((error.square().mean() / spread).sqrt()), rel=0.01)
