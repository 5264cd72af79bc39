"""Names of codecs: what they stand for, and what is said about those that stand for none."""

from dataclasses import replace

import pytest
import torch

import kvferry
from kvferry.errors import ProfileMismatch
from kvferry.evaluation.ablations import STUDIES, choose_studies
from kvferry.evaluation.baselines import Fp8Cast, HadamardInt, IntPerTokenHead, Kivi
from kvferry.evaluation.codec_names import (
    DEFAULT,
    DEFAULT_WITH_PROFILE,
    NamedProfile,
    ProfileBounded,
    hadamard_basis,
    not_unrotated,
    parse_codec,
    parse_codecs,
    split_names,
)
from kvferry.evaluation.coders import Chunked, CodecCoder, OneSide, RawSinks
from kvferry.evaluation.schemes import Guarantee, SigmaBounded


def coder_of(name, profiles=()):
    (scheme,) = parse_codec(name, profiles)
    assert scheme.name == name
    return scheme.coder


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("raw", kvferry.Raw()),
        ("lossless", kvferry.Lossless()),
        ("lossless-bitpack", kvferry.Lossless(packing="bitpack")),
        ("bounded:0.1sigma", SigmaBounded(0.1)),
        ("bounded-plain-bitpack:0.1sigma", SigmaBounded(0.1, "bitpack", "plain")),
        ("bounded-flat:2e-1sigma", SigmaBounded(0.2, grouping="flat")),
        ("bounded:0.01range", kvferry.Bounded(0.01)),
        ("bounded:.01tile", kvferry.Bounded(0.01, relative_to="tile")),
        ("bounded:1channel", kvferry.Bounded(1.0, relative_to="channel")),
        ("bounded-outlier:0.5abs", kvferry.Bounded(0.5, relative=False, mode="outlier")),
    ],
)
def test_codecs(name, codec):
    assert coder_of(name) == CodecCoder(codec)


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("fp8", Fp8Cast()),
        ("int8", IntPerTokenHead(8)),
        ("int3", IntPerTokenHead(3)),
        ("kivi2", Kivi(2)),
        ("kivi4:64", Kivi(4, 64)),
        ("hadamard4", HadamardInt(4)),
    ],
)
def test_baselines(name, baseline):
    assert coder_of(name) == baseline
    assert parse_codec(name)[0].guarantee is Guarantee.NONE


def test_modifiers_wrap_from_left_to_right():
    assert coder_of("int4@k") == OneSide(IntPerTokenHead(4), "k")
    assert coder_of("kivi2@sinks4@chunk256") == Chunked(RawSinks(Kivi(2), 4), 256)
    families = {scheme.family for scheme in parse_codecs(["int4", "int4@k", "int4@v", "int2@v"])}
    assert len(families) == 3


def test_names_of_a_profile(demo_profile):
    one = [NamedProfile("a", demo_profile)]
    assert coder_of("transform:1.0", one).codec == kvferry.Transform(demo_profile)
    assert coder_of("transform:6x", one).codec == kvferry.Transform(demo_profile, ratio=6.0)
    assert coder_of("bounded:profile", one) == CodecCoder(ProfileBounded(demo_profile))
    assert coder_of("bounded:profile*1.5", one) == CodecCoder(ProfileBounded(demo_profile, 1.5))
    two = [*one, NamedProfile("b", demo_profile)]
    assert [scheme.name for scheme in parse_codecs(["transform:2@k", "fp8"], two)] == [
        "transform:2 (a)@k",
        "transform:2 (b)@k",
        "fp8",
    ]


def test_bounds_of_a_profile_are_absolute_and_scaled(demo_profile):
    assert ProfileBounded(demo_profile, 1.5)(3, "v", torch.zeros(1)) == kvferry.Bounded(0.2 * 1.5, relative=False)
    without = replace(demo_profile.layers[0].k, bound=0.0)
    bare = replace(demo_profile, layers=((without, demo_profile.layers[0].v),))
    with pytest.raises(ValueError, match="no bound for layer 0 k"):
        ProfileBounded(bare)(0, "k", torch.zeros(1))
    with pytest.raises(ProfileMismatch, match="layer 7"):
        ProfileBounded(demo_profile)(7, "k", torch.zeros(1))


def test_variants_of_a_profile_change_one_thing(demo_profile):
    turned = hadamard_basis(demo_profile)
    assert turned.rope == demo_profile.rope
    assert [layer.k.step for layer in turned.layers] == [layer.k.step for layer in demo_profile.layers]
    assert turned.group_heads == 1
    rotated = not_unrotated(demo_profile)
    assert rotated.rope.rotary_dim == 0
    assert all(a.k is b.k and a.v is b.v for a, b in zip(rotated.layers, demo_profile.layers, strict=True))
    assert len({demo_profile.digest, turned.digest, rotated.digest}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zip", "unknown codec 'zip': give raw, lossless"),
        ("bounded:0.1", "unknown codec 'bounded:0.1'.*0.1sigma"),
        ("bounded:0sigma", "codec 'bounded:0sigma': error_bound=0.0"),
        ("bounded:-1sigma", "unknown codec"),
        ("int5", "codec 'int5': 5 bits are none of 2, 3, 4, 8"),
        ("kivi4:0", "codec 'kivi4:0': groups of 0"),
        ("int4:64", "unknown codec 'int4:64'"),
        ("transform:1", "codec 'transform:1': it needs a profile: give --profile"),
        ("bounded:profile", "needs a profile"),
        ("int4@q", "codec 'int4@q': unknown modifier 'q'; give @k"),
        ("int4@sinks0", "unknown modifier 'sinks0'"),
    ],
)
def test_bad_names_are_named_with_the_options(name, message):
    with pytest.raises(ValueError, match=message):
        parse_codec(name)


@pytest.mark.parametrize(
    ("name", "message"), [("transform:0", "error_bound=0.0"), ("bounded:profile*0", "factor of 0")]
)
def test_bad_numbers_for_a_profile(name, message, demo_profile):
    with pytest.raises(ValueError, match=message):
        parse_codec(name, [NamedProfile("a", demo_profile)])


def test_lists_of_names(demo_profile):
    assert split_names(" int4, fp8,,int4 ") == ["int4", "fp8"]
    assert split_names("default") == list(DEFAULT)
    assert split_names("fp8,default", with_profile=True) == [
        "fp8",
        *(n for n in DEFAULT if n != "fp8"),
        *DEFAULT_WITH_PROFILE,
    ]
    with pytest.raises(ValueError, match="names no codec"):
        split_names(" , ")
    assert len(parse_codecs(DEFAULT)) == len(DEFAULT)
    assert len(parse_codecs(DEFAULT_WITH_PROFILE, [NamedProfile("a", demo_profile)])) == len(DEFAULT_WITH_PROFILE)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_studies_name_codecs(study, demo_profile):
    assert len(parse_codecs(study.codecs, [NamedProfile("a", demo_profile)])) == len({*study.codecs}) > 2
    if study.needs_profile:
        with pytest.raises(ValueError, match="needs a profile"):
            parse_codecs(study.codecs)
    else:
        parse_codecs(study.codecs)


def test_studies_are_chosen_by_name():
    everything = choose_studies(["default"], with_profile=True)
    assert everything == list(STUDIES)
    without = choose_studies(["sinks", "default"], with_profile=False)
    assert {study.name for study in without} == {study.name for study in STUDIES if not study.needs_profile}
    assert without[0].name == "sinks"
    assert choose_studies(["none"], with_profile=True) == []
    with pytest.raises(ValueError, match=r"unknown study 'moon': give some of sides"):
        choose_studies(["moon"], with_profile=True)
    with pytest.raises(ValueError, match="'basis' needs a profile"):
        choose_studies(["basis"], with_profile=False)
