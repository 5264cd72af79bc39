"""Profiles: what they are made of, their files, their digests, and what they are compared with."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from contract.profiles import make_profile, orthonormal, rope_of
from kvferry import CorruptProfile, Profile, ProfileMismatch, Rope
from kvferry.codecs.transform.profile import Layer, SideProfile

pytest.importorskip("safetensors")


def side(step: float = 0.5, bound: float = 0.0, mean: float = 0.0, seed: int = 0, n: int = 8) -> SideProfile:
    return SideProfile.of(torch.full((2, n), mean), orthonormal(2, n, seed), step, bound)


def small(**changes: object) -> Profile:
    """Two layers of two heads of 8, each on its own."""
    parts = {
        "layers": (Layer(side(), side(0.25, seed=1)), Layer(side(0.75, seed=2), side(1.0, seed=3))),
        "heads": 2,
        "head_dim": 8,
        "group_heads": 1,
        "rope": rope_of("partial", 8),
        "model": {"name": "small"},
        "certificate": {"ratio": 4.5, "text": "none"},
    }
    return Profile(**(parts | changes))  # type: ignore[arg-type]


def assert_same(left: Profile, right: Profile) -> None:
    assert left.digest == right.digest
    assert (left.heads, left.head_dim, left.group_heads, left.rope) == (
        (right.heads, right.head_dim, right.group_heads, right.rope)
    )
    assert (left.model, left.certificate) == (right.model, right.certificate)
    for mine, other in zip(left.layers, right.layers, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a.step, a.bound) == (b.step, b.bound)
            assert a.mean.equal(b.mean)
            assert a.basis.equal(b.basis)


class TestFiles:
    @pytest.mark.parametrize(
        ("heads", "group_heads", "rope"), [(4, 1, "none"), (4, 2, "halves"), (3, 3, "interleaved")]
    )
    def test_round_trip(self, heads: int, group_heads: int, rope: str, tmp_path: Path) -> None:
        certificate = {"ratio": 0.1 + 0.2, "texts": ["é", None], "nested": {"kl": 1e-300}}
        profile = make_profile(heads, 20, group_heads, rope, step=0.1).with_certificate(certificate)
        profile.save(tmp_path / "profile.safetensors")
        assert_same(Profile.load(str(tmp_path / "profile.safetensors")), profile)

    def test_parts_that_share_memory(self, tmp_path: Path) -> None:
        """Hadamard profiles have one mean; a copy with other steps has all tensors of the first."""
        profile = Profile.hadamard(2, 2, 8, Rope.none(8), [(0.5, 0.25), (0.5, 0.125)])
        profile.save(tmp_path / "a")
        assert_same(Profile.load(tmp_path / "a"), profile)
        transposed = replace(small(), layers=tuple(
            Layer(*(SideProfile(p.mean, p.basis.transpose(1, 2), p.step) for p in pair)) for pair in small().layers
        ))  # fmt: skip
        transposed.save(tmp_path / "b")
        assert_same(Profile.load(tmp_path / "b"), transposed)

    def test_altered_at_any_byte(self, tmp_path: Path) -> None:
        """No byte of a file is without a check: every thirteenth is tried, one bit of it."""
        path = tmp_path / "profile"
        small().save(path)
        whole = path.read_bytes()
        for at in range(0, len(whole), 13):
            data = bytearray(whole)
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            with pytest.raises(CorruptProfile):
                Profile.load(path)

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "profile"
        small().save(path)
        whole = path.read_bytes()
        for length in (*range(64), *range(64, len(whole), 37)):
            path.write_bytes(whole[:length])
            with pytest.raises(CorruptProfile):
                Profile.load(path)

    def test_other_files(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        other = tmp_path / "other"
        save_file({"weight": torch.ones(3)}, str(other))
        with pytest.raises(CorruptProfile, match=r"other is no profile"):
            Profile.load(other)
        other.write_text("{}")
        with pytest.raises(CorruptProfile, match="is no profile"):
            Profile.load(other)
        with pytest.raises(FileNotFoundError, match=r"no profile .*absent.*kvferry calibrate"):
            Profile.load(tmp_path / "absent")
        with pytest.raises(FileNotFoundError):
            Profile.load(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": 2}, "version 2, this reads 1"),
            ({"heads": 4}, "groups"),
            ({"heads": "2"}, "no profile"),
            ({"heads": None}, "no profile"),
            ({"group_heads": 0}, "no profile"),
            ({"head_dim": 16}, "rope"),
            ({"rope": {}}, "no profile"),
            ({"rope": [1]}, "no profile"),
            ({"rope": {"head_dim": 8, "rotary_dim": 0, "inv_freq": []}}, "altered"),
            ({"steps_and_bounds": [[0.5, 0.0]] * 3}, "no profile"),
            ({"steps_and_bounds": [[0.5, 0.0]] * 6}, "no profile"),
            ({"steps_and_bounds": [[0.5, 0.0]] * 4}, "altered"),
            ({"steps_and_bounds": [[-0.5, 0.0]] * 4}, "step=-0.5"),
            ({"steps_and_bounds": [[10**400, 0.0]] * 4}, "no profile"),
            ({"steps_and_bounds": [[math.nan, 0.0]] * 4}, "step=nan"),
            ({"steps_and_bounds": [[0.5, math.inf]] * 4}, "bound=inf"),
            ({"steps_and_bounds": []}, "no profile"),
            ({"digest": ""}, "altered"),
            ({"digest": None}, "altered"),
        ],
    )
    def test_forged(self, changes: dict[str, object], message: str, tmp_path: Path) -> None:
        """The description altered, and its checksum made right."""
        path = tmp_path / "profile"
        small().save(path)
        rewrite(path, lambda described: described | changes)
        with pytest.raises(CorruptProfile, match=message):
            Profile.load(path)

    @pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '"version"', "[" * 100_000])
    def test_forged_description(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "profile"
        small().save(path)
        rewrite(path, lambda _: text)
        with pytest.raises(CorruptProfile):
            Profile.load(path)

    def test_the_certificate_is_protected(self, tmp_path: Path) -> None:
        """It is not in the digest, which says what decoding needs: the file's checksum covers it."""
        path = tmp_path / "profile"
        small().save(path)
        data = path.read_bytes()
        assert data.count(b"4.5") == 1
        path.write_bytes(data.replace(b"4.5", b"9.5"))
        with pytest.raises(CorruptProfile, match="altered"):
            Profile.load(path)


def rewrite(path: Path, change: object) -> None:
    """Replace the description in a profile's file."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    described = change(json.loads(metadata["kvferry_profile"]))  # type: ignore[operator]
    text = described if isinstance(described, str) else json.dumps(described)
    metadata["kvferry_profile"] = text
    metadata["kvferry_checksum"] = xxhash.xxh3_128_hexdigest(text.encode())
    encoded = json.dumps(header).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


class TestDigest:
    def test_it_stays(self) -> None:
        """Frames name profiles by it. No basis comes of arithmetic here that machines could differ in."""
        basis = torch.tensor([[3, 4], [-4, 3]]) * 32768 // 5
        parts = [SideProfile(torch.tensor([[0.5, -2.0]]), basis[None].short(), step) for step in (0.25, 0.5)]
        profile = Profile((Layer(*parts),), 1, 2, 1, Rope(2, 2, (1.0,)))
        assert profile.digest == "4c37988114dd28012fc758f4f7222bd3"

    def test_sensitive_to_all_that_decoding_depends_on(self) -> None:
        profile = small()
        first, second = profile.layers
        mean, basis = first.k.mean.clone(), first.k.basis.clone()
        mean[1, 7] += 2.0**-20
        basis[1, 7, 3] += 1
        others = [
            small(layers=(second, first)),
            small(layers=(Layer(first.v, first.k), second)),
            small(layers=(first,)),
            small(layers=(Layer(SideProfile(mean, first.k.basis, 0.5), first.v), second)),
            small(layers=(Layer(SideProfile(first.k.mean, basis, 0.5), first.v), second)),
            small(rope=rope_of("none", 8)),
            small(rope=rope_of("halves", 8)),
            small(rope=replace(profile.rope, interleaved=True)),
            small(rope=replace(profile.rope, inv_freq=tuple(math.nextafter(f, 2) for f in profile.rope.inv_freq))),
            profile.with_steps([(0.5, 0.25), (0.75, math.nextafter(1.0, 2))]),
        ]
        digests = [profile.digest, *(other.digest for other in others)]
        assert len(set(digests)) == len(digests)
        assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests)

    def test_not_to_what_it_does_not_depend_on(self) -> None:
        profile = small()
        assert small(model={}, certificate={}).digest == profile.digest
        assert profile.with_bounds([(1.0, 2.0), (3.0, 4.0)]).digest == profile.digest
        assert small().digest == profile.digest


class TestSideProfile:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mean": torch.zeros(8)}, r"mean is torch.float32 \(8,\): give float32"),
            ({"mean": torch.zeros(2, 8, dtype=torch.float64)}, "mean is torch.float64"),
            ({"mean": torch.zeros(0, 8)}, "give float32"),
            ({"mean": torch.zeros(2, 0)}, "give float32"),
            ({"mean": torch.zeros(1, 8)}, r"basis is torch.int16 \(2, 8, 8\): give int16 \(1, 8, 8\)"),
            ({"basis": torch.zeros(2, 8, 8)}, "basis is torch.float32"),
            ({"basis": torch.zeros(2, 8, 7, dtype=torch.int16)}, "basis is torch.int16"),
            ({"mean": torch.full((2, 8), math.nan)}, "not finite"),
            ({"mean": torch.full((2, 8), 1e38)}, r"beyond 2\*\*100"),
            ({"step": 0.0}, "step=0.0"),
            ({"step": -1.0}, "step=-1.0"),
            ({"step": math.nan}, "step=nan"),
            ({"step": 1e-50}, "step=1e-50 must be at least 9.09e-13"),
            ({"step": 1e39}, "step=1e.39 must be at least .* at most 1.27e.30"),
            ({"bound": -0.5}, "bound=-0.5"),
            ({"bound": math.inf}, "bound=inf"),
        ],
    )
    def test_parts_are_checked(self, changes: dict[str, object], message: str) -> None:
        good = side()
        parts = {"mean": good.mean, "basis": good.basis, "step": good.step, "bound": good.bound}
        with pytest.raises(ValueError, match=message):
            SideProfile(**(parts | changes))  # type: ignore[arg-type]

    def test_everything_is_on_the_cpu(self) -> None:
        with pytest.raises(ValueError, match=r"mean is on meta.*on the CPU"):
            SideProfile(torch.zeros(2, 8, device="meta"), side().basis, 1.0)

    def test_bases_that_are_not_orthonormal(self) -> None:
        good = orthonormal(2, 8, 0)
        for wrong in (0 * good, 0.9 * good, good[:, :, [0, 0, 2, 3, 4, 5, 6, 7]], torch.ones(2, 8, 8) / 8, good.abs()):
            with pytest.raises(ValueError, match="not orthonormal: it deviates by"):
                SideProfile.of(torch.zeros(2, 8), wrong, 1.0)
        # One bad group among good ones, and a basis that is almost one.
        mixed = torch.cat((good[:1], 0.9 * good[1:]))
        with pytest.raises(ValueError, match="not orthonormal"):
            SideProfile.of(torch.zeros(2, 8), mixed, 1.0)
        with pytest.raises(ValueError, match="not orthonormal"):
            SideProfile.of(torch.zeros(2, 8), good * 1.002, 1.0)

    @pytest.mark.parametrize("n", [1, 8, 150, 256])
    def test_deviation(self, n: int) -> None:
        """The largest singular value of B B^T - I, rounded up; rounding to 16 bits leaves it small."""
        part = SideProfile.of(torch.zeros(2, n), orthonormal(2, n, 5), 1.0)
        basis = part.basis.double() / 2**15
        exact = max(float(torch.linalg.svdvals(b @ b.T - torch.eye(n)).max()) for b in basis)
        assert exact <= part.deviation <= exact + 2**-19
        assert part.deviation < 1e-3 * math.sqrt(n / 16 + 1)
        assert part.deviation * 2**20 == int(part.deviation * 2**20)

    def test_other_steps_and_bounds(self) -> None:
        part = side(0.5, 0.25)
        other = part.with_scalars(step=0.125)
        assert (other.step, other.bound, part.step) == (0.125, 0.25, 0.5)
        assert other.basis is part.basis
        assert part.with_scalars(bound=1.0).bound == 1.0
        with pytest.raises(ValueError, match="step=0"):
            part.with_scalars(step=0.0)
        with pytest.raises(ValueError, match="bound=-1"):
            part.with_scalars(bound=-1.0)


class TestProfile:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layers": ()}, "0 layers"),
            ({"heads": 3}, r"2 groups of 8 channels, not 3 of 8"),
            ({"heads": 4, "group_heads": 3}, "groups divide the heads"),
            ({"group_heads": 0}, "groups of 0"),
            ({"group_heads": 2}, "2 groups of 8 channels, not 1 of 16"),
            ({"head_dim": 4}, "the rope is of head_dim=8, the profile of 4"),
            ({"head_dim": 4, "rope": Rope.none(4)}, "layer 0 k has 2 groups of 8 channels, not 2 of 4"),
            ({"heads": 256, "group_heads": 256}, "at most 1024 channels"),
            ({"layers": (Layer(side(), side(n=4)),)}, "layer 0 v has 2 groups of 4"),
        ],
    )
    def test_parts_that_do_not_fit_together(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small(**changes)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"layers": 3}, "layers=2, this one has 3"),
            ({"heads": 8}, "heads=2, this one has 8"),
            ({"head_dim": 16}, "head_dim=8, this one has 16"),
            ({"rope": rope_of("none", 8)}, "another RoPE .rotary_dim=4, against 0"),
            ({"rope": Rope(8, 4, (1.0, 0.02))}, r"first frequencies \(0.01,\), against \(0.02,\)"),
            ({"rope": Rope(8, 4, (1.0, 0.01), interleaved=True)}, "another RoPE"),
        ],
    )
    def test_a_mismatch_names_what_differs(self, asked: dict[str, object], message: str) -> None:
        profile = small()
        assert profile.rope.inv_freq == (1.0, 0.01)
        profile.check(layers=2, heads=2, head_dim=8, rope=Rope(8, 4, (1.0, 0.01 * (1 + 1e-7))))
        with pytest.raises(ProfileMismatch, match=message) as caught:
            profile.check(**asked)  # type: ignore[arg-type]
        assert "calibrate" in str(caught.value)

    def test_a_layer_that_it_does_not_have(self) -> None:
        profile = small()
        assert profile.side(1, "v") is profile.layers[1].v
        for layer in (-1, 2):
            with pytest.raises(ProfileMismatch, match=f"layer {layer} is not in a profile of 2 layers"):
                profile.side(layer, "k")

    def test_other_steps_have_no_certificate(self) -> None:
        profile = small().with_bounds([(1.0, 2.0), (3.0, 4.0)])
        assert profile.certificate
        other = profile.with_steps([(0.1, 0.2), (0.3, 0.4)])
        assert other.certificate == {}
        assert [part.step for layer in other.layers for part in layer] == [0.1, 0.2, 0.3, 0.4]
        assert [part.bound for layer in other.layers for part in layer] == [1.0, 2.0, 3.0, 4.0]
        with pytest.raises(ValueError, match="argument"):
            profile.with_steps([(0.1, 0.2)])


@pytest.mark.parametrize("head_dim", [1, 2, 6, 16, 80, 128])
def test_hadamard(head_dim: int) -> None:
    """Blocks of the largest power of two that divides the width, each value of equal weight in all of its block."""
    profile = Profile.hadamard(1, 3, head_dim, Rope.none(head_dim), [(0.5, 0.25)])
    assert (profile.groups, profile.n, profile.layers[0].v.step) == (3, head_dim, 0.25)
    block = head_dim & -head_dim
    basis = profile.layers[0].k.basis.double() / 2**15
    entry = min(1 / math.sqrt(block), 1 - 2**-15)
    for start in range(0, head_dim, block):
        square = basis[:, start : start + block, start : start + block]
        assert (square.abs() - entry).abs().max() <= 2**-16
    assert int((basis != 0).sum()) == 3 * head_dim * block
    assert not profile.layers[0].k.mean.any()


def test_hadamard_needs_steps_of_each_layer() -> None:
    with pytest.raises(ValueError, match="1 pairs of steps for 2 layers"):
        Profile.hadamard(2, 1, 8, Rope.none(8), [(0.5, 0.5)])


def test_hadamard_spreads_an_outlier() -> None:
    """What it is for: one large channel becomes sqrt(n) times smaller coefficients."""
    basis: Tensor = Profile.hadamard(1, 1, 64, Rope.none(64), [(1.0, 1.0)]).layers[0].k.basis[0].double() / 2**15
    spread = torch.zeros(64, dtype=torch.float64).index_fill(0, torch.tensor(13), 100.0) @ basis
    assert spread.abs().max() == pytest.approx(100 / 8, rel=1e-3)
