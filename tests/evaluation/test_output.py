"""A whole evaluation on the model that ships with kvferry, and the files that are made of it."""

import base64
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from kvferry.errors import ProfileMismatch
from kvferry.evaluation import Guarantee, PrefixProtocol
from kvferry.evaluation.codec_names import NamedProfile
from kvferry.evaluation.html import page, pareto_front
from kvferry.evaluation.output import draw, write_all
from kvferry.evaluation.run import Plan, evaluate

pytest.importorskip("matplotlib")

CODECS = ("lossless", "bounded:0.2sigma", "int4", "int2", "transform:1", "bounded:profile*0.5")


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def evaluation(demo_source, demo_profile, progress):
    plan = Plan(
        PrefixProtocol(prefix=384, score=24, generate=4),
        sequences=1,
        codecs=CODECS,
        profiles=[NamedProfile("demo", demo_profile)],
        sensitivity=["int2"],
        studies=["modes", "un-rotation"],
        trials=1,
    )
    return evaluate(demo_source, plan, lambda *step: progress.append(step))


@pytest.fixture(scope="module")
def folder(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new"
    machine, versions = {"cpu": "a <cpu>"}, {"torch": torch.__version__}
    assert write_all(folder, evaluation, machine, versions) == folder / "evaluation.html"
    return folder


def test_every_part_is_there(evaluation):
    assert [result.name for result in evaluation.results] == list(CODECS)
    assert {result.name for result in evaluation.retrieval} == {*CODECS}
    assert len(evaluation.sensitivity) == 8
    assert [study.study.name for study in evaluation.studies] == ["modes", "un-rotation"]
    for study in evaluation.studies:
        assert [result.name for result in study.results] == list(study.study.codecs)
    assert evaluation.broken == []
    assert all(result.drift_tokens for result in evaluation.results)
    assert len(evaluation.all_results) == len(CODECS) + 2 + 3


def test_codecs_of_studies_are_not_measured_twice(evaluation):
    shared = evaluation.studies[0].results[0]
    assert shared.name == "bounded:0.2sigma"
    assert shared is evaluation.results[1]


def test_progress_counts_up_to_the_end_of_each_stage(evaluation, progress):
    stages = list(dict.fromkeys(stage for stage, *_ in progress))
    assert stages == ["codecs", "retrieval", "sensitivity", "studies"]
    for stage in stages:
        steps = [(done, total) for name, done, total, _ in progress if name == stage]
        assert [done for done, _ in steps] == list(range(steps[0][1]))


def test_json_has_all_of_it(folder, evaluation, demo_profile):
    content = json.loads((folder / "evaluation.json").read_text())
    assert content["protocol"] == {
        "prefix": 384, "score": 24, "repeats": 1, "generate": 4, "sequences": 1, "retrieval_trials": 1,
    }  # fmt: skip
    assert [row["name"] for row in content["results"]] == list(CODECS)
    row = content["results"][2]
    assert {"ratio", "bits_k", "kl_p99", "top5_agreement", "perplexity_change", "drift_mean"} <= row.keys()
    assert row["kl_nats"] == evaluation.results[2].kl_nats
    assert content["profiles"] == [{"name": "demo", "digest": demo_profile.digest, "group_heads": 2}]
    assert content["retrieval"][0]["gain"] == evaluation.retrieval[0].gain
    assert content["sensitivity"][3]["layer"] == 1
    assert [study["name"] for study in content["studies"]] == ["modes", "un-rotation"]
    assert content["text"]["tokens"] > 1000
    assert len(content["text"]["digest"]) == 32


def test_csv_tables(folder, evaluation):
    def rows(name):
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    assert [row["name"] for row in rows("evaluation")] == list(CODECS)
    assert float(rows("evaluation")[3]["kl_nats"]) == evaluation.results[3].kl_nats
    assert rows("evaluation")[0]["drift_tokens"] == "4"
    assert len(rows("retrieval")) == 2 * len(CODECS)
    assert [row["side"] for row in rows("sensitivity")] == 4 * ["k", "v"]
    assert {row["study"] for row in rows("studies")} == {"modes", "un-rotation"}


class Page(HTMLParser):
    """Collects tags, addresses and cells, and that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone(folder, evaluation):
    text = (folder / "evaluation.html").read_text()
    parsed = Page()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    assert {"script", "link", "iframe"}.isdisjoint(parsed.seen)
    assert not re.search(r"https?://|url\(|@import", text)
    pictures = [base64.b64decode(a.removeprefix("data:image/png;base64,"), validate=True) for a in parsed.addresses]
    files = {path.read_bytes() for path in folder.glob("*.png")}
    assert {*pictures} == files
    assert len(files) == 7
    assert all(picture.startswith(b"\x89PNG") for picture in files)
    assert {*CODECS, "a <cpu>", "needle: 3 questions", "key-value: 4 questions"} <= {*parsed.text}
    assert "Every guarantee held" in text


def test_the_page_says_what_was_broken(evaluation):
    broken = replace(evaluation.results[1], guarantee=Guarantee.EXACT)
    changed = replace(evaluation, results=[evaluation.results[0], broken])
    text = page(changed, draw(changed), {}, {})
    assert "Guarantees broken: bounded:0.2sigma" in text
    assert 'class="family broken"' in text


def test_parts_that_were_not_measured_are_left_out(evaluation):
    plan = replace(evaluation.plan, protocol=PrefixProtocol(384, 24))
    bare = replace(evaluation, plan=plan, retrieval=[], sensitivity=[], studies=[], remarks=["a <remark>"])
    text = page(bare, draw(bare), {}, {})
    assert not {"Greedy drift", "Long-range", "Studies"} & {*re.findall(r"<h2>([^<]*)</h2>", text)}
    assert "a &lt;remark&gt;" in text


def test_the_front_is_what_nothing_beats(evaluation):
    front = pareto_front(evaluation.results)
    assert "lossless" in front
    by_name = {result.name: result for result in evaluation.results}
    worse = replace(by_name["lossless"], name="worse", encoded_bytes=by_name["lossless"].encoded_bytes + 1)
    same = replace(by_name["lossless"], name="same")
    assert pareto_front([*evaluation.results, worse, same]) == front | {"same"}


def test_without_a_tokenizer_retrieval_is_left_out(demo_source):
    plan = Plan(PrefixProtocol(32, 8), sequences=1, codecs=["raw"], trials=2)
    found = evaluate(replace(demo_source, tokenizer=None), plan)
    assert found.retrieval == []
    assert "no tokenizer" in found.remarks[0]


def test_a_profile_of_another_model_is_refused(demo_source, demo_profile):
    other = replace(demo_profile, layers=demo_profile.layers[:3])
    plan = Plan(PrefixProtocol(32, 8), codecs=["transform:1"], profiles=[NamedProfile("a", other)], trials=0)
    with pytest.raises(ProfileMismatch, match="layers=3, this one has 4"):
        evaluate(demo_source, plan)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "qwen3"])
def test_other_architectures(demo_source, kind):
    """Learned positions and no KV groups; sliding windows shorter than the prefix; norms of keys."""
    import transformers

    sizes = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    elif kind == "gemma3":
        types = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(
            **sizes, num_key_value_heads=1, head_dim=16, intermediate_size=32, sliding_window=32, layer_types=types
        )
    else:
        config = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16, intermediate_size=32)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    codecs = ["lossless", "bounded:0.2sigma", "kivi2@sinks4", "int4@chunk16"]
    plan = Plan(PrefixProtocol(64, 16, generate=4), 1, codecs, sensitivity=["int2"], studies=["chunks"], trials=0)
    found = evaluate(replace(demo_source, model=model, tokenizer=None), plan)
    assert found.broken == []
    assert found.results[0].drift_mean == 4
    assert found.results[2].kl_nats > 0
    assert len(found.sensitivity) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_whole_evaluation_on_the_gpu(demo_profile):
    from kvferry.evaluation.source import load_source

    codecs = ["lossless", "bounded:0.2sigma", "fp8", "int3", "kivi2@sinks4", "hadamard4", "transform:1@chunk64"]
    profiles = [NamedProfile("demo", demo_profile)]
    plan = Plan(PrefixProtocol(384, 24, generate=4), 1, codecs, profiles, ["int2"], ["modes"], trials=1)
    found = evaluate(load_source(None, "cuda"), plan)
    assert found.broken == []
    assert found.results[0].kl_nats == 0
    assert all(0 < result.kl_nats < 1 for result in found.results[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 0}, "sequences is 0"),
        ({"trials": -1}, "trials is -1"),
        ({"codecs": ["zip"]}, "unknown codec 'zip'"),
        ({"sensitivity": ["zip"]}, "unknown codec 'zip'"),
        ({"studies": ["zip"]}, "unknown study 'zip'"),
    ],
)
def test_plans_are_checked_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(PrefixProtocol(), **options)
