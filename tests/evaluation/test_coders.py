"""Coders that wrap coders: what comes back, what is promised for it, and that damaged bytes are refused."""

import pytest
import torch

import kvferry
from kvferry.errors import CorruptFrame
from kvferry.evaluation.baselines import IntPerTokenHead, Kivi
from kvferry.evaluation.coders import Chunked, CodecCoder, OneSide, Place, RawSinks, from_bytes, to_bytes

CPU = torch.device("cpu")
K, V = Place(1, "k"), Place(1, "v")
SHAPE = (1, 2, 150, 64)
COARSE = CodecCoder(kvferry.Bounded(error_bound=0.5, relative=False))


@pytest.fixture
def tensor():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def through(coder, tensor, place=K):
    return coder.decode(coder.encode(tensor, place), place, tuple(tensor.shape), tensor.dtype, CPU)


def test_a_codec_writes_its_frames_and_says_their_bound(tensor):
    data = COARSE.encode(tensor, K)
    assert data == kvferry.compress(tensor, COARSE.codec)
    assert torch.equal(through(COARSE, tensor), kvferry.decompress(data))
    assert COARSE.bound(data, K) == 0.5


def test_a_choice_is_asked_for_each_place(tensor):
    coder = CodecCoder(lambda layer, side, values: kvferry.Raw() if (layer, side) == (1, "v") else COARSE.codec)
    assert torch.equal(through(coder, tensor, V), tensor)
    assert not torch.equal(through(coder, tensor, K), tensor)


def test_one_side_leaves_the_other_alone(tensor):
    coder = OneSide(COARSE, "v")
    assert coder.encode(tensor, K) == to_bytes(tensor)
    assert torch.equal(through(coder, tensor, K), tensor)
    assert coder.bound(coder.encode(tensor, K), K) == 0
    assert coder.encode(tensor, V) == COARSE.encode(tensor, V)
    assert coder.bound(coder.encode(tensor, V), V) == 0.5


@pytest.mark.parametrize("inner", [COARSE, IntPerTokenHead(2), Kivi(2)], ids=["codec", "int2", "kivi2"])
@pytest.mark.parametrize("place", [K, V])
def test_sinks_are_exact_and_the_rest_is_the_inner_coders(tensor, inner, place):
    coder = RawSinks(inner, 4)
    back = through(coder, tensor, place)
    assert torch.equal(back[..., :4, :], tensor[..., :4, :])
    assert torch.equal(back[..., 4:, :], through(inner, tensor[..., 4:, :], place))
    data = coder.encode(tensor, place)
    assert len(data) == 8 + 4 * 2 * 64 * 2 + len(inner.encode(tensor[..., 4:, :], place))
    assert coder.bound(data, place) == (0.5 if inner is COARSE else None)


def test_a_tensor_of_sinks_alone_is_exact(tensor):
    for tokens in (150, 1000):
        coder = RawSinks(COARSE, tokens)
        assert torch.equal(through(coder, tensor), tensor)
        assert coder.bound(coder.encode(tensor, K), K) == 0


@pytest.mark.parametrize("inner", [COARSE, IntPerTokenHead(2), Kivi(2)], ids=["codec", "int2", "kivi2"])
def test_chunks_are_coded_apart(tensor, inner):
    coder = Chunked(inner, 64)
    parts = tensor.split(64, dim=-2)
    assert torch.equal(through(coder, tensor), torch.cat([through(inner, part) for part in parts], dim=-2))
    data = coder.encode(tensor, K)
    assert len(data) == sum(4 + len(inner.encode(part, K)) for part in parts)
    assert coder.bound(data, K) == (0.5 if inner is COARSE else None)


def test_the_bound_of_chunks_is_the_largest(tensor):
    tensor[..., 70, 0] = 100
    relative = Chunked(CodecCoder(kvferry.Bounded(error_bound=0.01)), 64)
    bounds = [CodecCoder(kvferry.Bounded(error_bound=0.01)).bound(part, K) for part in frames(tensor)]
    assert relative.bound(relative.encode(tensor, K), K) == max(bounds) > 10 * min(bounds)


def frames(tensor):
    return [kvferry.compress(part, kvferry.Bounded(error_bound=0.01)) for part in tensor.split(64, dim=-2)]


def test_chunks_of_nothing_are_nothing():
    empty = torch.empty(1, 2, 0, 64, dtype=torch.bfloat16)
    assert through(Chunked(COARSE, 64), empty).shape == empty.shape


def test_a_transform_knows_where_its_chunks_are(tensor, demo_profile):
    codec = kvferry.Transform(demo_profile)
    whole, chunked = CodecCoder(codec), Chunked(RawSinks(CodecCoder(codec), 2), 64)
    second = tensor[..., 66:128, :]
    frame = kvferry.compress(second, kvferry.Transform(demo_profile, 1, "k", first_position=66))
    assert frame in chunked.encode(tensor, K)
    # Tiles of 64 tokens are coded alike, wherever the chunks end.
    assert torch.equal(through(Chunked(whole, 64), tensor), through(whole, tensor))


@pytest.mark.parametrize("coder", [RawSinks(COARSE, 4), Chunked(COARSE, 64)])
def test_damaged_parts_are_refused(tensor, coder):
    data = coder.encode(tensor, K)
    for broken in (data[:-1], data[:2], data + b"\1\0\0\0x", b"\xff" * 8):
        with pytest.raises(CorruptFrame):
            coder.decode(broken, K, SHAPE, torch.bfloat16, CPU)


def test_bytes_of_another_shape_are_refused(tensor):
    assert torch.equal(from_bytes(to_bytes(tensor), SHAPE, torch.bfloat16, CPU), tensor)
    with pytest.raises(CorruptFrame, match="38400 bytes where"):
        from_bytes(to_bytes(tensor), (1, 2, 150, 65), torch.bfloat16, CPU)


@pytest.mark.parametrize("make", [RawSinks, Chunked])
def test_no_tokens_are_refused(make):
    with pytest.raises(ValueError, match="of 0 tokens: give at least 1"):
        make(COARSE, 0)
