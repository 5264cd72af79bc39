"""Real KV from a file and from the built-in model."""

import pytest
import torch

from kvferry.bench.kv_source import built_in_kv, load_kv

safetensors_torch = pytest.importorskip("safetensors.torch")


def saved(path, **changes):
    tensors = {f"layer.{layer:02}.{side}": torch.ones(1, 2, 8, 32) for layer in range(2) for side in "kv"}
    tensors |= {name.replace("_", "."): tensor for name, tensor in changes.items()}
    safetensors_torch.save_file(tensors, path)
    return path


def test_a_file_is_named_without_its_path(tmp_path):
    source = load_kv(saved(tmp_path / "small-kv.safetensors"))
    expected = {"name": "small-kv", "dtype": "float32", "layers": 2, "shape_of_a_layers_k": [1, 2, 8, 32]}
    assert source.describe() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": torch.ones(1)}, "does not hold tensors layer.00.k"),
        ({"layer_01_v": torch.ones(1, 2, 9, 32)}, r"layer\.01\.v is torch\.float32 \(1, 2, 9, 32\)"),
        ({"layer_01_k": torch.ones(1, 2, 8, 32).half()}, r"layer\.01\.k is torch\.float16"),
        ({"layer_00_v": torch.full((1, 2, 8, 32), float("inf"))}, r"layer\.00\.v has values that are not finite"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_kv(saved(tmp_path / "kv.safetensors", **changes))


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    (tmp_path / "kv.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_kv(tmp_path / "kv.safetensors")
    with pytest.raises(FileNotFoundError):
        load_kv(tmp_path / "none.safetensors")


def test_the_built_in_model_makes_real_kv():
    pytest.importorskip("transformers")
    source = built_in_kv(sequences=1, tokens=64)
    assert source.name == "built-in demo model, 1 x 64 held-out tokens"
    assert source.describe()["shape_of_a_layers_k"] == [1, 2, 64, 64] and len(source.tensors) == 8
    k = source.tensors["layer.00.k"]
    assert k.dtype == torch.bfloat16 and bool(k.isfinite().all()) and float(k.float().std()) > 0.1
