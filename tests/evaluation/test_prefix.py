"""The prefix protocol on a tiny random model: figures against plain formulas, and that broken promises are seen."""

import copy
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import kvferry
from kvferry.store import HostStore

transformers = pytest.importorskip("transformers")

from kvferry.evaluation import (  # noqa: E402
    CodecScheme,
    Guarantee,
    PrefixProtocol,
    continue_greedily,
    default_schemes,
    evaluate_prefix,
    prefill,
    report,
    spread_windows,
)
from kvferry.evaluation.baselines import IntPerTokenHead, baseline_scheme  # noqa: E402
from kvferry.evaluation.schemes import SigmaBounded, range_scheme  # noqa: E402
from kvferry.evaluation.tally import largest_error, same_bits  # noqa: E402

PROTOCOL = PrefixProtocol(prefix=40, score=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(97, (2, PROTOCOL.window), generator=torch.Generator().manual_seed(1))


def test_all_default_schemes_keep_their_guarantees(model, windows):
    schemes = default_schemes(range_bounds=(0.01, 0.04), sigma_bounds=(0.2,))
    steps = []
    results = evaluate_prefix(model, windows, schemes, PROTOCOL, on_step=lambda i, scheme: steps.append(scheme.name))
    assert [result.name for result in results] == [scheme.name for scheme in schemes]
    assert steps == 2 * [scheme.name for scheme in schemes]
    for result in results:
        assert result.guarantee_kept, result.name
        assert result.num_values == 2 * 2 * 2 * 2 * 40 * 16
        assert result.raw_bytes == 2 * result.num_values
        assert result.ratio == pytest.approx(16 / result.bits_per_value)
        assert result.encode_gbps > 0
        assert result.decode_gbps > 0
        if result.guarantee is Guarantee.EXACT:
            assert (result.kl_nats, result.perplexity_change, result.top1_agreement) == (0, 0, 1)
            assert (result.max_abs_error, result.error_over_bound) == (0, 0)
        else:
            assert result.kl_nats > 0
            assert not result.kv_identical
        if result.guarantee is Guarantee.BOUND:
            assert 0.5 < result.error_over_bound <= 1
    coarse = next(result for result in results if result.name == "bounded fixed 0.04 range")
    fine = next(result for result in results if result.name == "bounded fixed 0.01 range")
    assert coarse.ratio > fine.ratio
    assert coarse.kl_nats > fine.kl_nats


def test_figures_are_those_of_the_plain_formulas(model, windows):
    scheme = range_scheme(0.05)
    (result,) = evaluate_prefix(model, windows, [scheme], PROTOCOL)
    kl, nll, nll_restored, agree, top5, worst = [], [], [], [], [], 0.0
    encoded = {"k": 0, "v": 0}
    for window in windows:
        cache = prefill(model, window[None, :40])
        store = HostStore(1 << 20)
        entry = store.put_cache("a", cache, kvferry.Bounded(error_bound=0.05))
        encoded["k"] += sum(map(len, entry.frames[0::2]))
        encoded["v"] += sum(map(len, entry.frames[1::2]))
        restored = store.restore_cache("a")
        for a, b in zip(cache.layers, restored.layers, strict=True):
            worst = max(worst, float((a.keys.double() - b.keys.double()).abs().max()))
            worst = max(worst, float((a.values.double() - b.values.double()).abs().max()))
        with torch.no_grad():
            p = model(input_ids=window[None, 40:52], past_key_values=cache).logits[0].double().log_softmax(-1)
            q = model(input_ids=window[None, 40:52], past_key_values=restored).logits[0].double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        target = window[41:53, None]
        nll.append(-p.gather(1, target))
        nll_restored.append(-q.gather(1, target))
        agree.append((p.argmax(-1) == q.argmax(-1)).double())
        for left, right in zip(p.topk(5).indices.tolist(), q.topk(5).indices.tolist(), strict=True):
            top5.append(len({*left} & {*right}) / 5)
    assert result.kl_nats == pytest.approx(float(torch.cat(kl).mean()))
    assert result.nll_untouched == pytest.approx(float(torch.cat(nll).mean()))
    assert result.nll_restored == pytest.approx(float(torch.cat(nll_restored).mean()))
    assert result.perplexity_change == pytest.approx(math.exp(result.nll_restored - result.nll_untouched) - 1)
    assert result.top1_agreement == pytest.approx(float(torch.cat(agree).mean()))
    assert result.kl_p99 == pytest.approx(float(np.quantile(torch.cat(kl).numpy(), 0.99)))
    assert result.top5_agreement == pytest.approx(sum(top5) / len(top5))
    assert 0 < result.top5_agreement < 1
    assert result.encoded_bytes == sum(encoded.values())
    assert result.bits_k == pytest.approx(16 * encoded["k"] / result.num_values)
    assert result.bits_v == pytest.approx(16 * encoded["v"] / result.num_values)
    assert result.max_abs_error == worst


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_all_default_schemes_keep_their_guarantees_on_the_gpu(model, windows):
    schemes = default_schemes(range_bounds=(0.01,), sigma_bounds=(0.2,))
    results = evaluate_prefix(copy.deepcopy(model).to("cuda"), windows, schemes, PROTOCOL)
    assert all(result.guarantee_kept for result in results), [r.name for r in results if not r.guarantee_kept]


@dataclass(frozen=True)
class Overpromising(CodecScheme):
    """Claims half the bound that its codec keeps."""

    def bounds(self, entry):
        return [bound / 2 for bound in super().bounds(entry)]


def test_broken_promises_are_seen(model, windows):
    bounded = kvferry.Bounded(error_bound=0.02)
    schemes = [
        Overpromising("too tight", "", bounded, Guarantee.BOUND),
        CodecScheme("not exact", "", bounded, Guarantee.EXACT),
        CodecScheme("no promise", "", bounded, Guarantee.NONE),
    ]
    tight, exact, none = evaluate_prefix(model, windows, schemes, PROTOCOL)
    assert not tight.guarantee_kept
    assert tight.error_over_bound > 1
    assert not exact.guarantee_kept
    assert none.guarantee_kept
    assert none.error_over_bound is None


def test_the_callers_store_is_used_and_left_empty(model, windows):
    store = HostStore(1 << 20)
    evaluate_prefix(model, windows, [baseline_scheme(IntPerTokenHead())], PrefixProtocol(40, 12, repeats=3), store)
    assert store.stats().stores == 6
    assert len(store) == 0
    store.check_integrity()


def test_greedy_continuation_is_that_of_generate(model, windows):
    ids = windows[:1, :41]
    tokens, logits = continue_greedily(model, prefill(model, ids[:, :-1]), ids[:, -1:], 6)
    assert logits.shape == (6, 97)
    cache = copy.deepcopy(prefill(model, ids[:, :-1]))
    expected = model.generate(
        ids, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tokens.tolist() == expected[0, 41:].tolist()


def test_drift_is_where_greedy_texts_part(model, windows):
    protocol = PrefixProtocol(40, 12, generate=10)
    schemes = [baseline_scheme(IntPerTokenHead(2)), CodecScheme("raw", "", kvferry.Raw(), Guarantee.EXACT)]
    coarse, raw = evaluate_prefix(model, windows, schemes, protocol)
    assert raw.drift_tokens == (10, 10)
    assert raw.drift_mean == 10
    expected = []
    for window in windows:
        cache, store = prefill(model, window[None, :40]), HostStore(1 << 20)
        schemes[0].store(store, "a", cache)
        first = window[None, 40:41]
        other = continue_greedily(model, schemes[0].restore(store, "a", None), first, 10)[0].tolist()
        own = continue_greedily(model, cache, first, 10)[0].tolist()
        expected.append(next((i for i in range(10) if own[i] != other[i]), 10))
    assert coarse.drift_tokens == tuple(expected)
    assert min(expected) < 10
    (without,) = evaluate_prefix(model, windows, schemes[1:], PROTOCOL)
    assert without.drift_tokens == ()
    assert without.drift_mean is None
    with pytest.raises(ValueError, match="generate is -1"):
        PrefixProtocol(generate=-1)


def test_windows_are_taken_from_documents_in_turn():
    documents = [torch.arange(100), torch.arange(5), torch.arange(1000, 1050)]
    windows = spread_windows(documents, 10, 5)
    assert windows[:, 0].tolist() == [0, 1000, 45, 1040, 90]
    assert all(window.tolist() == list(range(window[0], window[0] + 10)) for window in windows)
    assert spread_windows(documents, 10, 1)[:, 0].tolist() == [0]
    with pytest.raises(ValueError, match="texts of at most 100"):
        spread_windows(documents, 101, 1)


@pytest.mark.parametrize("name", ["prefix", "score", "repeats"])
def test_protocol_is_checked(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        PrefixProtocol(**{name: 0})


def test_windows_of_another_length_are_refused(model, windows):
    with pytest.raises(ValueError, match=r"give \[sequences, 53\] tokens"):
        evaluate_prefix(model, windows[:, :-1], [], PROTOCOL)


def test_errors_count_only_finite_values_but_every_bit():
    nan, inf = math.nan, math.inf
    original = torch.tensor([1.0, nan, inf, -0.0])
    assert largest_error(original, original.clone()) == 0
    assert largest_error(original, torch.tensor([1.25, nan, inf, 0.0])) == 0.25
    assert largest_error(original, torch.tensor([1.0, nan, -inf, 0.0])) == inf
    assert largest_error(original, torch.tensor([nan, nan, inf, 0.0])) == inf
    assert largest_error(torch.empty(0), torch.empty(0)) == 0
    assert same_bits(original, original.clone())
    assert not same_bits(original, original.abs())


def test_sigma_bounds_fall_back_to_lossless_where_there_is_no_deviation():
    choose = SigmaBounded(0.1)
    tensor = torch.randn(1, 2, 30, 16)
    assert choose(0, "k", tensor).error_bound == pytest.approx(0.1 * float(tensor.std()))
    for odd in (torch.zeros(3, 4), torch.empty(0, 4), torch.full((3, 4), math.inf)):
        assert choose(0, "v", odd) == kvferry.Lossless()


def test_report_writes_table_numbers_and_plot(model, windows, tmp_path):
    rich_console = pytest.importorskip("rich.console")
    pytest.importorskip("matplotlib")
    schemes = default_schemes(range_bounds=(0.01, 0.04), sigma_bounds=(0.2,))
    results = evaluate_prefix(model, windows, schemes, PROTOCOL)
    console = rich_console.Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(results, "title"))
    text = console.export_text()
    assert all(result.name in text for result in results)
    report.plot(tmp_path / "plot.png", results, "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report.plot(tmp_path / "exact.png", results[:1], "only exact schemes")
    report.write_json(tmp_path / "n.json", results, PROTOCOL, 2, {"name": "tiny"}, torch.device("cpu"))
    content = json.loads((tmp_path / "n.json").read_text())
    assert content["protocol"] == {"prefix": 40, "score": 12, "repeats": 1, "generate": 0, "sequences": 2}
    assert content["machine"]["cpu"]
    assert content["versions"]["torch"] == torch.__version__
    assert [row["name"] for row in content["results"]] == [result.name for result in results]
    assert all({"ratio", "kl_nats", "guarantee_kept"} <= row.keys() for row in content["results"])
