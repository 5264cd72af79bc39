"""What measures the codec transform, run in small on the CPU: which values it measures on, and what stops it."""

import math

import pytest
import torch

from contract.profiles import assert_within_profile, make_profile
from kvferry import Profile, Rope, SlotCodec, Transform
from kvferry.bench import codec_transform
from kvferry.bench.codec import CodecPlan, run
from kvferry.bench.codec_batch import MIB, Batch, Kind, Sample, Timer, basis_of
from kvferry.bench.codec_transform import TransformBatch, check_profile, describe_profile
from kvferry.bench.pipeline_cache import Shape
from kvferry.errors import KVFerryError, ProfileMismatch

CPU = torch.device("cpu")
LAYERS, SEQUENCES, HEADS, TOKENS, DIM, PAGE, CHUNK = 2, 2, 2, 150, 32, 16, 32
CHUNK_BYTES = LAYERS * HEADS * 2 * DIM * 2 * CHUNK
WHOLE = TOKENS // CHUNK * CHUNK
"""Tokens of a sequence that are measured on."""


@pytest.fixture(scope="module")
def tensors():
    """Of a profile that fits: heads alike, RoPE on keys."""
    rope = make_profile(HEADS, DIM, 2).rope
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in range(LAYERS):
        for side in "kv":
            mixed = torch.randn(SEQUENCES, HEADS, TOKENS, 4, generator=generator)
            x = mixed @ torch.randn(4, DIM, generator=generator) + torch.randn(DIM, generator=generator)
            if side == "k":
                x = rope.rotate(x, *rope.table(torch.arange(TOKENS)))
            found[f"layer.{layer:02}.{side}"] = x.to(torch.bfloat16)
    return found


def timer(l2_bytes=2 * CHUNK_BYTES):
    found = Timer(CPU, iterations=2, case_seconds=0.1)
    found.bytes_per_s, found.l2_bytes = 1e9, l2_bytes
    return found


def kind(group_heads=2, packing="bitpack"):
    return Kind("transform", packing, profile=make_profile(HEADS, DIM, group_heads))


@pytest.fixture
def batch(tensors):
    return TransformBatch(tensors, kind().profile, PAGE, CHUNK, 5 * CHUNK_BYTES, timer(), CPU)


def chunk(layer, pages):
    """`[heads, tokens, K|V]` of a chunk's pages."""
    return layer[pages.long()].transpose(0, 1).flatten(1, 2)


def test_every_head_is_at_its_own_positions(batch, tensors):
    assert batch.sets == 2 and batch.chunks == 5 and batch.raw_bytes == 5 * CHUNK_BYTES
    assert batch.positions.flatten().tolist() == [32, 64, 96, 0, 32, 64, 96, 0, 32, 64]
    sequences = [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    tables = batch.sources.flatten(0, 1)
    for pages, position, sequence in zip(tables, batch.positions.flatten().tolist(), sequences, strict=True):
        at = slice(position, position + CHUNK)
        for number, layer in enumerate(batch.cache.layers):
            expected = [tensors[f"layer.{number:02}.{side}"][sequence, :, at] for side in "kv"]
            assert torch.equal(chunk(layer, pages), torch.cat(expected, -1))


@pytest.mark.parametrize("group_heads", [1, 2])
@pytest.mark.parametrize("packing", ["ans", "bitpack"])
def test_what_was_measured_keeps_the_guarantee(tensors, group_heads, packing):
    """Computed anew, frame by frame as it were."""
    asked = kind(group_heads, packing)
    batch = TransformBatch(tensors, asked.profile, PAGE, CHUNK, 5 * CHUNK_BYTES, timer(), CPU)
    row = batch.measure(asked, Sample(), "relax")
    assert row["mode"] == "transform" and row["packing"] == packing and row["bound_sigma"] is None
    assert row["basis"] == ("per head" if group_heads == 1 else "per layer")
    assert row["ratio"] > 1 and row["moved_bytes"] == pytest.approx(batch.raw_bytes * (1 + 1 / row["ratio"]), rel=1e-4)
    for leg in ("encode", "decode"):
        assert row[leg]["of_limit"] == pytest.approx(row["limit_us"] / row[leg]["median_us"])
    worst = 0.0
    for number in range(LAYERS):
        for place, side in enumerate("kv"):
            tables = zip(batch.sources.flatten(0, 1), batch.destinations.flatten(0, 1), strict=True)
            for (source, target), position in zip(tables, batch.positions.flatten().tolist(), strict=True):
                codec = Transform(asked.profile, number, side, first_position=position)
                layer = batch.cache.layers[number]
                before, after = (chunk(layer, pages)[..., DIM * place :][..., :DIM] for pages in (source, target))
                worst = max(worst, float(assert_within_profile(before, after, codec, 1.0, math.inf).max()))
    assert row["error_over_bound"] == pytest.approx(worst, rel=1e-3) and worst > 0.1


def test_ratio_counts_headers_directories_and_marks(batch):
    row = batch.measure(kind(), Sample(), "relax")
    tiles = 2 * LAYERS + 1  # of the vectors of both heads; the last is of marks
    encoded = 0
    for slot in batch.slots:
        whole = 64 + 8 * tiles + int(slot[20:24].view(torch.int32))  # docs/format.md, "Slot"
        assert slot[whole - 4 : whole].any() and not slot[whole:].any()
        encoded += whole
    assert row["ratio"] == pytest.approx(batch.sets * batch.raw_bytes / encoded)


def test_positions_are_those_of_the_rope(batch, tensors):
    """The ratio of keys that are turned back is better than of keys that are turned on."""
    asked = Kind("transform", "ans", profile=fitted(tensors))
    right = batch.measure(asked, Sample(), "relax")["ratio"]
    batch.positions = batch.positions * 0 + 1000
    assert right > 1.1 * batch.measure(asked, Sample(), "relax")["ratio"]


def fitted(tensors):
    """A profile of each head's principal components."""
    from kvferry.codecs.transform.profile import Layer, SideProfile

    rope, layers = make_profile(HEADS, DIM, 2).rope, []
    for number in range(LAYERS):
        pair = []
        for side in "kv":
            x = tensors[f"layer.{number:02}.{side}"].float()
            if side == "k":
                x = rope.unrotate(x, *rope.table(torch.arange(TOKENS)))
            rows = x.transpose(0, 1).flatten(1, 2).double()
            centred = rows - rows.mean(1, keepdim=True)
            basis = torch.linalg.eigh(centred.transpose(1, 2) @ centred)[1].flip(-1)
            pair.append(SideProfile.of(rows.mean(1), basis, 0.25))
        layers.append(Layer(*pair))
    return Profile(tuple(layers), HEADS, DIM, 1, rope)


def broken(monkeypatch, leg, change):
    """Calls `change(given)` after each `SlotCodec.encode` or `decode` of a batch, not of the reference."""
    real = getattr(SlotCodec, leg)

    def call(self, *given):
        real(self, *given)
        if self.kv.num_pages > CHUNK // PAGE and isinstance(self.codec, Transform):
            change(*given)

    monkeypatch.setattr(SlotCodec, leg, call)


def test_other_bytes_than_the_references_stop_the_measuring(batch, monkeypatch):
    """Such as those of chunks that are coded as if they were elsewhere; decoded so, they keep every bound."""
    assert int(batch.positions[0, 0]) > 0
    real = {leg: getattr(SlotCodec, leg) for leg in ("encode", "decode")}

    def elsewhere(leg):
        def call(self, *given):
            *others, positions = given
            batches = self.kv.num_pages > CHUNK // PAGE and isinstance(self.codec, Transform)
            real[leg](self, *others, torch.zeros_like(positions) if batches else positions)

        return call

    for leg in real:
        monkeypatch.setattr(SlotCodec, leg, elsewhere(leg))
    monkeypatch.setattr(TransformBatch, "share_of_bound", lambda self, kind: 0.5)
    with pytest.raises(KVFerryError, match="bytes of the first chunk are not those of the CPU reference"):
        batch.measure(kind(), Sample(), "relax")


def test_broken_promises_stop_the_measuring(batch, monkeypatch):
    layer = batch.cache.layers[1]
    broken(monkeypatch, "decode", lambda slots, index, table, *rest: layer[int(table[0, 1]), 0, 0, :1].add_(64))
    with pytest.raises(KVFerryError, match=r"transform per layer bitpack: the largest error is .* of the bound"):
        batch.measure(kind(), Sample(), "relax")


def test_refused_slots_stop_the_measuring(batch, monkeypatch):
    broken(monkeypatch, "encode", lambda table, slots, index, *rest: slots[index[1], 300].bitwise_xor_(1))
    with pytest.raises(KVFerryError, match="transform per layer bitpack: the decoder refused 2 of 10 slots"):
        batch.measure(kind(), Sample(), "relax")


def test_pages_that_no_decoder_wrote_stop_the_measuring(batch, monkeypatch):
    monkeypatch.setattr(SlotCodec, "decode", lambda self, slots, index, table, names, status, at: status.zero_())
    with pytest.raises(KVFerryError, match="the largest error is nan of the bound"):
        batch.measure(kind(), Sample(), "relax")


def test_sequences_longer_than_a_codecs_usual_context(monkeypatch, tensors):
    monkeypatch.setattr(Batch, "max_positions", 40)
    batch = TransformBatch(tensors, kind().profile, PAGE, CHUNK, CHUNK_BYTES, timer(0), CPU)
    assert batch.max_positions == WHOLE


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        ((3, HEADS, DIM), "layers=3, this one has 2"),
        ((LAYERS, 4, DIM), "heads=4, this one has 2"),
        ((LAYERS, HEADS, 64), "head_dim=64, this one has 32"),
    ],
)
def test_a_profile_of_another_model_is_refused_before_anything_is_measured(tensors, made_for, message):
    layers, heads, dim = made_for
    profile = Profile.hadamard(layers, heads, dim, Rope.none(dim), [(0.5, 0.5)] * layers)
    told = []
    with pytest.raises(ProfileMismatch, match=message):
        run(tensors, CodecPlan(sizes=(CHUNK_BYTES,)), CPU, told.append, profile)
    assert not told


def test_kv_that_transform_does_not_take_is_refused(tensors):
    given = {name: tensor.float() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"the KV is torch\.float32, and codec transform takes bfloat16 or float16"):
        check_profile(given, kind().profile)
    check_profile({name: tensor.half() for name, tensor in tensors.items()}, kind().profile)


def test_short_sequences_are_refused(tensors):
    with pytest.raises(ValueError, match="sequences of 150 tokens are shorter than a chunk of 160"):
        TransformBatch(tensors, kind().profile, PAGE, 160, MIB, timer(0), CPU)


def test_what_a_result_says_of_a_profile():
    names = [basis_of(make_profile(4, 8, group_heads)) for group_heads in (1, 2, 4)]
    assert names == ["per head", "per 2 heads", "per layer"]
    assert basis_of(make_profile(1, 8, 1)) == "per head"
    profile = make_profile(4, 8, 2)
    told = describe_profile(profile)
    assert told["digest"] == profile.digest and told["basis"] == "per 2 heads"
    assert (told["layers"], told["heads"], told["head_dim"], told["group_heads"]) == (2, 4, 8, 2)


def test_units_are_those_of_the_dtype():
    values = torch.tensor([1.0, -1.5, 2.0, 0.0, 3e-39], dtype=torch.bfloat16)
    following = (values.abs().view(torch.int16) + 1).view(torch.bfloat16).double()
    assert torch.equal(codec_transform._units(values), following - values.abs().double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group_heads", [1, 2])
def test_gpu_transform_is_measured(tensors, group_heads):
    plan = CodecPlan(sizes=(4 * MIB,), modes=("raw",), shape=Shape(LAYERS, HEADS), iterations=40, ceiling_bytes=1 << 24)
    results = run(tensors, plan, torch.device("cuda", 0), profile=make_profile(HEADS, DIM, group_heads))
    assert [row["packing"] for row in results["transform"]] == ["ans", "bitpack"]
    assert all(row["sets"] > 1 and row["error_over_bound"] <= 1 for row in results["transform"])
