"""The measuring code of `kvferry bench baseline`, run on the CPU; (`gpu`) on a GPU."""

import io
import json

import pytest
import torch

from kvferry.bench import baseline
from kvferry.bench.baseline import BaselineSettings, Case, cases, measure_baseline
from kvferry.bench.baseline_report import by_place, plot, table, write_json
from kvferry.bench.machine import describe
from kvferry.bench.units import format_size, parse_size
from kvferry.errors import KVFerryError

SMALL = BaselineSettings(sizes=(4096, 65536), iterations=5, range_bytes=8192)


@pytest.fixture(scope="module")
def results():
    return measure_baseline(torch.device("cpu"), SMALL)


def test_every_case_by_every_method(results):
    told = []
    measure_baseline(torch.device("cpu"), BaselineSettings(sizes=(4096,), iterations=1), told.append)
    assert told == list(cases(BaselineSettings(sizes=(4096,))))
    places = by_place(results)
    assert len(places) == len(list(cases(SMALL))) == 2 * 5 + 2 * 3
    for (memory, direction, layout, num_bytes), rows in places.items():
        many = layout != "contiguous"
        assert set(rows) == {"copy_", "cuda_copy_", "copy_batch", *(["copy_ranges"] if many else [])}
        for row in rows.values():
            assert row["ranges"] == (num_bytes // 8192 if many else 1)
            assert row["repeats"] == 5
            assert 0 < row["median_us"] <= row["p99_us"]
            factor = 2 if direction == "both" else 1
            assert row["gb_per_s"] == pytest.approx(factor * num_bytes / row["median_us"] / 1e3)
        assert memory == "pinned" or (not many and direction != "both")


def test_wrong_bytes_are_not_timed(monkeypatch):
    monkeypatch.setattr(baseline, "copy_batch", lambda dsts, srcs, stream: dsts)
    with pytest.raises(KVFerryError, match=r"copy_batch, Case.*not those that were sent"):
        measure_baseline(torch.device("cpu"), SMALL)


def test_a_range_in_the_wrong_place_is_found(monkeypatch):
    """The check knows where each scattered range belongs."""
    bench = baseline.Bench(torch.device("cpu"), SMALL)
    case = Case("pinned", "h2d", "scattered", 65536, 8)
    bench.run(case)

    def swapped(dst, to, src, of, sizes, stream):
        for at, start in zip(to, of[::-1], strict=True):
            dst[at : at + 8192] = src[start : start + 8192]

    monkeypatch.setattr(baseline, "copy_ranges", swapped)
    with pytest.raises(KVFerryError, match="copy_ranges"):
        bench.run(case)
    bench.close()


def test_sizes_that_do_not_divide_have_no_ranges():
    found = list(cases(BaselineSettings(sizes=(100_000,), range_bytes=65536)))
    assert {case.layout for case in found} == {"contiguous"}
    assert found[2].total_bytes == 200_000


@pytest.mark.parametrize("wrong", [{"sizes": ()}, {"sizes": (0,)}, {"iterations": 0}, {"range_bytes": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BaselineSettings(**wrong)


def test_reports(results, tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(results))
    text = console.export_text()
    for part in ("pinned", "pageable", "scattered", "64 KiB", "copy_ranges"):
        assert part in text
    plot(tmp_path / "a.png", results, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_json(tmp_path / "a.json", results, SMALL, describe())
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["results"] == results
    assert content["settings"]["sizes"] == [4096, 65536]
    assert {"commit", "torch", "python", "processor"} <= set(content["machine"])


def test_the_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("KVFERRY_COMMIT", "abc")
    assert describe()["commit"] == "abc"
    monkeypatch.delenv("KVFERRY_COMMIT")
    assert describe()["commit"]


@pytest.mark.parametrize(
    ("text", "num_bytes", "again"),
    [
        ("4096", 4096, "4 KiB"),
        ("64KiB", 65536, "64 KiB"),
        (" 1 mib", 1 << 20, "1 MiB"),
        ("3GiB", 3 << 30, "3 GiB"),
        ("7B", 7, "7 B"),
    ],
)
def test_sizes_as_text(text, num_bytes, again):
    assert parse_size(text) == num_bytes
    assert format_size(num_bytes) == again


@pytest.mark.parametrize("text", ["", "KiB", "0", "-4", "1.5MiB", "4kb", "four"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_baseline():
    found = measure_baseline(torch.device("cuda"), BaselineSettings(sizes=(4096, 1 << 20), iterations=5))
    large = {(row["direction"], row["layout"], row["method"]): row for row in found if row["num_bytes"] == 1 << 20}
    assert large["h2d", "contiguous", "cuda_copy_"]["gb_per_s"] > 5
    facts = describe()
    assert facts["gpu"]
    assert facts["driver_api"] >= 12000
