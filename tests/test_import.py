"""`import kvferry` needs PyTorch, NumPy and xxhash alone: tried where optional packages are missing."""

import subprocess
import sys

import pytest

SCRIPT = """
import importlib.abc
import sys

BLOCKED = {blocked!r}


class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked")


sys.meta_path.insert(0, Block())
for name in BLOCKED:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " could be imported: the test blocks nothing")

import torch

import kvferry

tensor = torch.linspace(-3, 3, 70 * 40).view(70, 40)
for codec in (kvferry.Raw(), kvferry.Lossless(), kvferry.Lossless("bitpack")):
    assert kvferry.decompress(kvferry.compress(tensor, codec)).equal(tensor)
for packing in ("ans", "bitpack"):
    frame = kvferry.compress(tensor, kvferry.Bounded(0.25, relative=False, packing=packing))
    assert (kvferry.decompress(frame) - tensor).abs().max() <= 0.25
    assert kvferry.inspect(frame).ratio > 3
profile = kvferry.Profile.hadamard(1, 2, 32, kvferry.Rope.none(32), [(0.25, 0.25)])
values = torch.linspace(-3, 3, 2 * 70 * 32).view(2, 70, 32).bfloat16()
frame = kvferry.compress(values, kvferry.Transform(profile, 0, "k"))
assert (kvferry.decompress(frame) - values).abs().max() <= kvferry.inspect(frame).bound_used < 2
for call in (lambda: profile.save("none"), lambda: kvferry.Profile.load("none")):
    try:
        call()
    except ImportError as error:
        assert "pip install 'kvferry[transformers]'" in str(error) and "blocked" in str(error)
    else:
        raise SystemExit("a profile was saved or loaded without safetensors")
store = kvferry.HostStore(1 << 20)
assert not BLOCKED & {{name.partition(".")[0] for name in sys.modules}}

from kvferry.codecs.checks import gpu_kernels

try:
    gpu_kernels("slots")
except ImportError as error:
    assert "kvferry[gpu]" in str(error) and "blocked" in str(error)
else:
    raise SystemExit("the GPU kernels could be imported without the CUDA bindings")
print("works")
"""
BLOCKED = {"triton", "cuda", "transformers", "vllm", "matplotlib", "typer", "rich", "safetensors", "hypothesis"}


@pytest.mark.timeout(120)
def test_import_needs_nothing_optional() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(blocked=BLOCKED)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "works\n"
