"""What measures the pipeline, run in small on the CPU: the figures mean nothing there, the checks do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import kvferry
from kvferry.bench import pipeline_report
from kvferry.bench.pipeline import SECTIONS, run
from kvferry.bench.pipeline_cache import PagedCache, Shape
from kvferry.bench.pipeline_rig import Plan, Rig, Wire, summary
from kvferry.pipeline import Settings

CPU = torch.device("cpu")
TINY = Plan(
    shape=Shape(layers=2, heads=2),
    packing="bitpack",
    sizes_mib=(1,),
    ablation_mib=1,
    chunk_sizes=(16, 64),
    ratios=(2.0, 3.0),
    ratio=3.0,
    sm_caps=(8, None),
    bites_mib=((1, 2, 2),),
    restore_tokens=(100, 150),
    host_chunks=3,
    repeats=1,
    settings=Settings(ring_bytes=1 << 20, table_bytes=1 << 10),
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A small file of `benchmarks/dump_kv.py`: 3 layers, 2 sequences, 1 head of 32 channels."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layer.{layer:02}.{side}" for layer in range(3) for side in "kv"]
    return {name: torch.randn(2, 1, 70, 32, generator=generator).to(torch.bfloat16) for name in names}


def test_every_section_gives_rows_that_tables_and_files_take(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.bench.pipeline_rig.WARM_UPS", 0)
    results = run(tensors, TINY, CPU)
    assert list(results) == list(SECTIONS)
    assert results.pop("interference") == [], "it needs a GPU"
    assert all(results.values())
    assert {row["form"] for row in results["sizes"]} == {"staged", "fused", "raw"}
    assert [row["compressed"] for row in results["ablation"]] == ["neither", "D2H only", "H2D only", "both"]
    assert [(row["tokens"], row["chunks"]) for row in results["restore"]] == [(100, 2), (100, 2), (150, 3), (150, 3)]
    for row in results["sizes"]:
        assert row["store"]["gb_per_s"] > 0 and row["load"]["overlap"] > 0 and row["both"]["p99_ms"] > 0
        assert row["slot_ratio"] == pytest.approx(1.0 if row["form"] == "raw" else 3.0, rel=0.05)
    titles = [str(grid.title) for grid in pipeline_report.tables(results | {"interference": []})]
    assert len(titles) == len(results)
    path = tmp_path / "results.json"
    pipeline_report.write_json(path, results, TINY, {"gpu": "none"}, "made up")
    content = json.loads(path.read_text())
    assert content["plan"]["ratio"] == 3.0 and content["results"] == json.loads(json.dumps(results))
    pytest.importorskip("matplotlib")
    pipeline_report.plot(tmp_path / "plot.png", results, "title")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to plot"):
        pipeline_report.plot(tmp_path / "none.png", {"host": results["host"]}, "title")


def test_quick_plans_take_less():
    plan = Plan().quick()
    assert plan.repeats < Plan().repeats and len(plan.sm_caps) < len(Plan().sm_caps)
    assert plan.restore_tokens == Plan().restore_tokens
    with pytest.raises(ValueError, match="repeats=0: give more than 0"):
        Plan(repeats=0)


def test_unknown_sections_and_other_files_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="unknown section 'speed'; choose from sizes, ablation"):
        run(tensors, TINY, CPU, ["sizes", "speed"])
    with pytest.raises(ValueError, match=r"the file has no tensors layer\.00\.k"):
        run({"k": tensors["layer.00.k"], "v": tensors["layer.00.v"]}, TINY, CPU, ["host"])


def test_a_cache_is_full_of_the_files_values_and_bounds_follow_them(tensors: dict[str, Tensor]) -> None:
    cache = PagedCache(tensors, Shape(layers=4, heads=3), 100, 0.5, CPU)
    assert cache.pages == 7 and cache.kv.num_pages == 14
    values = {float(value) for tensor in tensors.values() for value in tensor.unique()}
    for layer in cache.layers:
        assert set(layer[torch.from_numpy(cache.sources)].unique().tolist()) <= values
    page = int(cache.sources[0])
    assert not torch.equal(cache.layers[0][page], cache.layers[3][page]), "a layer used again is shifted"
    expected = [0.5 * float(tensors[f"layer.{n:02}.{side}"].float().std()) for n in (0, 1, 2, 0) for side in "kv"]
    assert cache.sigma_bounds[::3].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="chunks of 40 tokens are no whole pages of 16"):
        cache.codec(kvferry.Raw(), 40, 1.0)
    with pytest.raises(ValueError, match="4 chunks of 2 pages are more than the cache's 7 pages"):
        cache.table(cache.sources, 4, 2)


@pytest.mark.parametrize("codec", [kvferry.Raw(), kvferry.Bounded(1.0, relative=False)])
def test_a_broken_promise_stops_the_measuring(tensors: dict[str, Tensor], codec: kvferry.Codec) -> None:
    cache = PagedCache(tensors, TINY.shape, 200, 0.2, CPU)
    with Rig(cache, codec, torch.zeros(1 << 20, dtype=torch.uint8), TINY) as rig:
        assert rig.checked(2)["chunks"] == 2
        cache.layers[1][int(cache.destinations[3])] += 1
        with pytest.raises(RuntimeError, match="layer 1"):
            cache.check(2, rig.chunk_pages, codec, 0)
        rig.slots[0, 5] ^= 1
        with pytest.raises(RuntimeError, match="load job 2"):
            rig.do("load", 2)


def test_summaries_and_wires():
    assert summary([0.003, 0.001, 0.002], 4_000_000) == {
        "repeats": 3,
        "median_ms": 2.0,
        "p99_ms": 3.0,
        "gb_per_s": pytest.approx(2.0),
    }
    wire = Wire(torch.zeros(1 << 16, dtype=torch.uint8), CPU, 3)
    assert wire.seconds("load", 1 << 20) == pytest.approx(16 * wire.seconds("load", 1 << 16))


def test_the_command_needs_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    from kvferry.cli.main import app

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(app, ["bench", "pipeline", "--kv", str(tmp_path / "kv.safetensors")])
    assert done.exit_code == 1
    assert "kvferry bench pipeline needs an NVIDIA GPU" in done.output
    done = CliRunner().invoke(app, ["bench", "pipeline", "--kv", "x", "--growth", "0"])
    assert done.exit_code == 2 and "growth=0" in done.output


def test_quick_keeps_what_was_chosen():
    assert replace(Plan(), ratio=3.0).quick().ratios == (3.0,)
