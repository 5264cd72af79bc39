"""The model that ships with kvferry, its text and a profile of its shape, for the tests of the evaluation."""

import pytest
import torch


@pytest.fixture(scope="session")
def demo_source():
    pytest.importorskip("transformers")
    from kvferry.evaluation.source import load_source

    return load_source(None)


@pytest.fixture(scope="session")
def demo_profile(demo_source):
    """Random bases, the model's RoPE, steps and bounds that do little harm."""
    from kvferry.codecs.transform.profile import Profile, SideProfile
    from kvferry.codecs.transform.rope import Rope

    generator = torch.Generator().manual_seed(0)

    def side(step):
        basis = torch.linalg.qr(torch.randn(1, 128, 128, generator=generator, dtype=torch.float64))[0]
        return SideProfile.of(torch.zeros(1, 128), basis, step, bound=0.2)

    layers = tuple((side(0.5), side(0.1)) for _ in range(4))
    return Profile(layers, 2, 64, 2, Rope.from_config(demo_source.config))
