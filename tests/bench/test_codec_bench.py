"""What measures the codecs, run in small on the CPU: the figures mean nothing there, the checks do."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvferry import Profile, Rope
from kvferry.bench import codec_baselines, codec_batch, codec_report
from kvferry.bench.codec import MODES, CodecPlan, run
from kvferry.bench.codec_batch import MIB, Batch, Kind, Sample, Timer
from kvferry.bench.pipeline_cache import Shape
from kvferry.codecs.slots import SlotCodec
from kvferry.errors import KVFerryError

CPU = torch.device("cpu")
CHUNK_BYTES = 2 * 2 * 2 * 32 * 2 * 32  # layers, heads, K and V, channels, bfloat16, tokens
TINY = CodecPlan(
    sizes=(CHUNK_BYTES, 3 * CHUNK_BYTES),
    shape=Shape(layers=2, heads=2),
    chunk_tokens=32,
    iterations=2,
    sweep_sigmas=(0.1, 0.4),
    sweep_sms=(4,),
    ceiling_bytes=1 << 16,
)
FIXED = Kind("fixed", "bitpack", 0.2)


@pytest.fixture(scope="module")
def tensors():
    """A small file of `benchmarks/dump_kv.py`: 3 layers, 2 sequences, 1 head of 32 channels."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layer.{layer:02}.{side}" for layer in range(3) for side in "kv"]
    return {name: torch.randn(2, 1, 70, 32, generator=generator).to(torch.bfloat16) for name in names}


@pytest.fixture
def timer():
    found = Timer(CPU, iterations=2, case_seconds=0.1)
    found.bytes_per_s = 1e9
    return found


@pytest.fixture
def batch(tensors, timer):
    timer.l2_bytes = 2 * CHUNK_BYTES
    return Batch(tensors, TINY.shape, TINY.chunk_tokens, 3 * CHUNK_BYTES, timer, CPU)


def test_every_section_gives_rows_that_tables_and_files_take(tensors, tmp_path):
    told = []
    profile = Profile.hadamard(3, 1, 32, Rope.none(32), [(0.4, 0.4)] * 3)
    results = run(tensors, TINY, CPU, told.append, profile)
    kinds = 2 * (len(MODES) - 1) + 1
    assert len(results["codecs"]) == 2 * kinds and len(results["baselines"]) == 2 * 2
    assert len(results["bounds"]) == 2 * 3 * 2 and len(results["num_sms"]) == 2 * kinds
    assert len(results["transform"]) == 2 * 2
    assert len(told) == 1 + 2 * (kinds + 1 + 2) + 12 + 2 * kinds
    assert {row["raw_bytes"] for row in results["codecs"]} == set(TINY.sizes)
    assert {row["raw_bytes"] for row in results["bounds"]} == {max(TINY.sizes)}
    assert results["ceiling"]["read_and_written_gb_per_s"] > 0 and results["notes"] == []
    for row in results["codecs"] + results["transform"] + results["baselines"]:
        assert row["moved_bytes"] == pytest.approx(row["raw_bytes"] * (1 + 1 / row["ratio"]), rel=1e-4)
        for leg in ("encode", "decode"):
            assert row[leg]["gb_per_s"] > 0 and row[leg]["p99_us"] >= row[leg]["median_us"]
            assert row[leg]["of_limit"] == pytest.approx(row["limit_us"] / row[leg]["median_us"])
    ratios = {(row["mode"], row["packing"]): row["ratio"] for row in results["codecs"]}
    assert ratios["fixed", "ans"] > ratios["lossless", "ans"] > 1 > ratios["raw", None] > 0.9
    fp8 = next(row for row in results["baselines"] if row["method"].startswith("fp8"))
    assert fp8["ratio"] == 2 and 0 < fp8["error_over_bound"] < 3
    by_sigma = {row["bound_sigma"]: row["ratio"] for row in results["bounds"] if row["mode"] == "fixed"}
    assert by_sigma[0.4] > by_sigma[0.1]

    grids = codec_report.tables(results)
    assert [str(grid.title) for grid in grids] == list(codec_report.TITLES.values())
    assert len(codec_report.tables(results | {"bounds": [], "num_sms": []})) == 3
    assert sum(profile.digest[:8] in line for line in codec_report.remarks(results)) == 1
    assert not any("waited" in line for line in codec_report.remarks(results))
    path = tmp_path / "results.json"
    codec_report.write_json(path, results, TINY, {"gpu": "none"}, {"name": "made up"})
    content = json.loads(path.read_text())
    assert content["plan"]["sigma"] == 0.2 and content["data"]["name"] == "made up"
    assert content["codecs"] == json.loads(json.dumps(results["codecs"]))
    pytest.importorskip("matplotlib")
    codec_report.plot(tmp_path / "plot.png", content, "title")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_files_from_before_the_transform_are_taken(tensors, tmp_path):
    results = run(tensors, replace(TINY, modes=("raw",), sweep_sigmas=(), sweep_sms=()), CPU)
    assert results["transform"] == [] and results["profile"] is None
    older = {name: value for name, value in results.items() if name not in ("transform", "profile")}
    assert len(codec_report.tables(older)) == 2 and codec_report.remarks(older) == codec_report.remarks(results)
    pytest.importorskip("matplotlib")
    codec_report.plot(tmp_path / "plot.png", older, "title")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_small_batches_are_many_sets_that_calls_rotate_over(batch, monkeypatch):
    assert batch.sets == 3 and batch.chunks == 3 and batch.raw_bytes == 3 * CHUNK_BYTES
    assert len(batch.sources.unique()) == batch.sources.numel() == 3 * 3 * 2
    assert not set(batch.sources.flatten().tolist()) & set(batch.destinations.flatten().tolist())
    values = batch.contiguous()
    assert values.shape == (3, 2, 6, 2, 16, 64)
    assert torch.equal(values[1, 1], batch.cache.layers[1][batch.sources[1].flatten().long()])
    seen = []
    encode = SlotCodec.encode
    monkeypatch.setattr(SlotCodec, "encode", lambda self, *given: (seen.append(int(given[2][0])), encode(self, *given)))
    row = batch.measure(FIXED, Sample(), "relax")
    assert set(seen) == {0, 3, 6} and row["sets"] == 3
    assert row["ratio"] > 2 and 0.5 < row["error_over_bound"] <= 1


def test_ratio_counts_headers_and_directories(batch):
    row = batch.measure(Kind("raw", "none", 0.2), Sample(), "relax")
    overhead = 64 + 8 * batch.kv.num_lines
    payload = CHUNK_BYTES + 4 * batch.kv.num_lines  # a tile's own header
    assert row["ratio"] == pytest.approx(CHUNK_BYTES / (overhead + payload), rel=0.01)


def test_the_references_slot_is_made_once(batch, monkeypatch):
    calls = []
    monkeypatch.setattr(codec_batch, "one_cpu_thread", lambda: (calls.append(1), torch.no_grad())[1])
    sample = Sample()
    for kind in (FIXED, FIXED, Kind("lossless", "bitpack", 0.2)):
        batch.measure(kind, sample, "relax")
    assert len(calls) == 2
    for layer in batch.cache.layers:
        layer += 1
    batch.measure(FIXED, sample, "relax")
    assert len(calls) == 3, "the values are others"


def broken(monkeypatch, leg, change):
    """Calls `change(given)` after each `SlotCodec.encode` or `decode` of a batch, not of the reference."""
    real = getattr(SlotCodec, leg)

    def call(self, *given):
        real(self, *given)
        if self.kv.num_pages > 2:
            change(*given)

    monkeypatch.setattr(SlotCodec, leg, call)


def test_other_bytes_than_the_references_stop_the_measuring(batch, monkeypatch):
    # A checksum that nobody looks at afterwards: the decoder is told to find everything good.
    broken(monkeypatch, "encode", lambda table, slots, index, names: slots[index[0], 200].bitwise_xor_(1))
    monkeypatch.setattr(SlotCodec, "decode", lambda self, slots, index, table, names, status: status.zero_())
    monkeypatch.setattr(Batch, "error_over_bound", lambda self, sigma: 0.5)
    with pytest.raises(KVFerryError, match="bytes of the first chunk are not those of the CPU reference"):
        batch.measure(FIXED, Sample(), "relax")


def test_refused_slots_stop_the_measuring(batch, monkeypatch):
    broken(monkeypatch, "encode", lambda table, slots, index, names: slots[index[1], 300].bitwise_xor_(1))
    with pytest.raises(KVFerryError, match=r"fixed bitpack, bound 0\.2 sigma: the decoder refused 3 of 9 slots"):
        batch.measure(FIXED, Sample(), "relax")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FIXED, "the largest error is .* of the bound"),
        (Kind("lossless", "bitpack", 0.2), "layer 1 is not bit-identical"),
    ],
)
def test_broken_promises_stop_the_measuring(batch, monkeypatch, kind, message):
    layer = batch.cache.layers[1]
    broken(monkeypatch, "decode", lambda slots, index, table, names, status: layer[int(table[0, 1]), 0, 0, :1].add_(8))
    with pytest.raises(KVFerryError, match=message):
        batch.measure(kind, Sample(), "relax")


def test_pages_that_no_decoder_wrote_stop_the_measuring(batch, monkeypatch):
    monkeypatch.setattr(SlotCodec, "decode", lambda self, slots, index, table, names, status: status.zero_())
    with pytest.raises(KVFerryError, match="the largest error is nan of the bound"):
        batch.measure(FIXED, Sample(), "relax")


def test_chunks_without_a_slot_stop_the_measuring(batch, monkeypatch):
    monkeypatch.setattr(SlotCodec, "encode", lambda self, *given: None)
    with pytest.raises(KVFerryError, match="not every slot holds its chunk at the asked bound"):
        batch.measure(FIXED, Sample(), "relax")


def test_waiting_calls_are_timed_alone(timer):
    timer._series = None  # must not be used
    row = timer.row({"encode": lambda number: None, "decode": lambda number: None}, 2, 1000, 2000, waits=True)
    assert not row["encode"]["queued"] and row["encode"]["repeats"] == 2
    assert row["limit_us"] == pytest.approx(2.0) and row["limit_gb_per_s"] == pytest.approx(0.5)
    slot = {"mode": "raw", "packing": None, "method": "slots", "ratio": 1.0, "error_over_bound": None} | row
    results = {"codecs": [slot], "baselines": [], "bounds": [], "num_sms": [], "notes": ["a note"]}
    results["ceiling"] = {"num_bytes": MIB, "read_and_written_gb_per_s": 1.0}
    assert any("waited for the host" in line for line in codec_report.remarks(results))
    assert codec_report.remarks(results)[-1] == "a note"
    assert codec_report.tables(results)[0].row_count == 1


def test_nvcomps_row_goes_through_its_python_calls(batch, timer, monkeypatch):
    """With a stand-in that stores bytes as they are, and no streams."""

    class Array(SimpleNamespace):
        @property
        def buffer_size(self):
            return self.tensor.numel() // 2

    fake = SimpleNamespace(
        __version__="9",
        as_array=lambda tensor, stream: Array(tensor=tensor),
        Codec=lambda **options: SimpleNamespace(encode=lambda array: array, decode=lambda array: array),
    )
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None, cuda_stream=5)
    monkeypatch.setattr(codec_baselines, "side_stream", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda given: torch.no_grad())
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: array.tensor)
    row = codec_baselines._nvcomp(fake, batch, timer, batch.contiguous(), "|u1", torch.uint8)
    assert row["method"] == "nvCOMP 9 ANS |u1" and row["ratio"] == 2.0 and not row["decode"]["queued"]
    assert row["moved_bytes"] == 1.5 * batch.raw_bytes
    fake.Codec = lambda **options: SimpleNamespace(
        encode=lambda array: array, decode=lambda array: Array(tensor=array.tensor ^ 1)
    )
    with pytest.raises(KVFerryError, match="round trip is not bit-identical"):
        codec_baselines._nvcomp(fake, batch, timer, batch.contiguous(), "|u1", torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ()}, "sizes are"),
        ({"sigma": 0.0}, r"the error bound is 0\.0"),
        ({"sweep_sigmas": (0.1, float("nan"))}, "the error bound is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"sweep_sms": (4, 0)}, "at least 1"),
        ({"modes": ("fast",)}, "encoding mode='fast' is unknown"),
        ({"packings": ("zip",)}, "packing='zip' is unknown"),
        ({"packings": ()}, "no packing"),
        ({"on_overflow": "cry"}, "on_overflow='cry'"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CodecPlan(**changes)


def test_sizes_below_a_chunk_are_refused(tensors, timer):
    with pytest.raises(ValueError, match="100 bytes are less than a chunk"):
        Batch(tensors, TINY.shape, 32, 100, timer, CPU)
    with pytest.raises(ValueError, match="chunks of 24 tokens are no whole pages"):
        Batch(tensors, TINY.shape, 24, CHUNK_BYTES, timer, CPU)


def test_kinds_are_modes_by_packings():
    assert [kind.name for kind in CodecPlan(modes=("raw", "plain")).kinds] == [
        "raw",
        "plain ans, bound 0.2 sigma",
        "plain bitpack, bound 0.2 sigma",
    ]


def test_errors_are_taken_over_each_lines_bound(batch):
    before = [torch.zeros(3, 2, 16, 64) for _ in range(2)]
    after = [tensor.clone() for tensor in before]
    bounds = batch.cache.sigma_bounds.view(2, 2, 2)
    after[1][2, 1, 3, 40] = 0.5 * float(bounds[1, 1, 1])  # layer 1, V, head 1
    assert batch.error_over_bound(1.0, lambda n: (before[n], after[n])) == pytest.approx(0.5)
    assert batch.error_over_bound(0.25, lambda n: (before[n], after[n])) == pytest.approx(2.0)
    after[0][0, 0, 0, 0] = float("nan")
    assert np.isnan(batch.error_over_bound(1.0, lambda n: (before[n], after[n])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_codecs_are_measured(tensors):
    changes = {"sizes": (4 * MIB,), "modes": ("fixed", "lossless", "raw"), "packings": ("ans",), "iterations": 40}
    results = run(tensors, replace(TINY, **changes), torch.device("cuda", 0))
    assert all(row[leg]["queued"] for row in results["codecs"] for leg in ("encode", "decode"))
    assert all(row["sets"] > 1 for row in results["codecs"]) and results["l2_bytes"] > 0
