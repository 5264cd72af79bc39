"""RoPE as models have it: angles against transformers' own, and keys turned and turned back."""

import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract.profiles import turned_back
from kvferry import Rope

HEAD_DIM = 64
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
SCALED = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, untruncated": YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, large base": YARN | {"rope_theta": 1000000.0},
    "yarn, factor of the contexts": YARN | {"factor": None},
}
MODELS = {
    "default": ("llama", "Llama", {}),
    "own base": ("qwen3", "Qwen3", {"rope_theta": 1000000.0, "head_dim": HEAD_DIM}),
    "gemma": ("gemma", "Gemma", {"head_dim": HEAD_DIM}),
    "linear": ("llama", "Llama", {"rope_parameters": LINEAR}),
    "llama3": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", "Llama", {"rope_parameters": YARN}),
    "partial": ("phi", "Phi", {"rope_parameters": HALF}),
    "partial, by default": ("gpt_neox", "GPTNeoX", {}),
    "interleaved": ("cohere", "Cohere", {}),
    "interleaved, ernie": ("ernie4_5", "Ernie4_5", {"head_dim": HEAD_DIM}),
    "interleaved, helium": ("helium", "Helium", {"head_dim": HEAD_DIM}),
    "interleaved and partial": ("glm", "Glm", {"head_dim": HEAD_DIM}),
    "interleaved and partial, glm4": ("glm4", "Glm4", {"head_dim": HEAD_DIM}),
}  # fmt: skip
"""(module, class, configuration) of models in transformers."""


def config_of(model: str, name: str, **parameters: object) -> object:
    pytest.importorskip("transformers")
    module = import_module(f"transformers.models.{model}.configuration_{model}")
    given = {
        "hidden_size": 4 * HEAD_DIM,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    }
    return getattr(module, f"{name}Config")(**(given | parameters))


@pytest.mark.parametrize("kind", SCALED)
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    utilities = pytest.importorskip("transformers.modeling_rope_utils")
    config = config_of("llama", "Llama", rope_parameters=dict(SCALED[kind]))
    rope = Rope.from_config(config)
    wanted, _ = utilities.ROPE_INIT_FUNCTIONS[SCALED[kind]["rope_type"]](config, torch.device("cpu"))
    assert rope.rotary_dim == HEAD_DIM
    assert torch.tensor(rope.inv_freq) == pytest.approx(wanted, rel=1e-5)
    # Not all the same scaling, or one of the branches would be untested.
    plain = Rope.from_config(config_of("llama", "Llama", rope_theta=SCALED[kind]["rope_theta"])).inv_freq
    ratios = {round(a / b, 4) for a, b in zip(rope.inv_freq, plain, strict=True)}
    assert (len(ratios) == 1) == (kind == "linear")


@pytest.mark.parametrize("kind", MODELS)
def test_keys_turn_as_in_transformers(kind: str) -> None:
    """A model's own rotary module and function turn keys as `rotate` does; `unrotate` gives back what they were."""
    model, name, parameters = MODELS[kind]
    config = config_of(model, name, **parameters)
    modeling = import_module(f"transformers.models.{model}.modeling_{model}")
    embedding = getattr(modeling, f"{name}RotaryEmbedding")(config)
    keys = torch.randn(1, 2, 50, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(100, 150)
    cos, sin = embedding(keys, positions[None])
    rope = Rope.from_config(config)
    # Some models turn only the channels that they hand over, others find out by the angles' width.
    rotary = cos.shape[-1]
    assert rope.rotary_dim == rotary
    turned = torch.cat((modeling.apply_rotary_pos_emb(keys[..., :rotary], keys[..., :rotary], cos, sin)[1],
                        keys[..., rotary:]), -1)  # fmt: skip
    turned /= embedding.attention_scaling
    table = rope.table(positions)
    assert (turned - keys).abs().max() > 1
    torch.testing.assert_close(rope.rotate(keys, *table), turned, rtol=0, atol=2e-4)
    torch.testing.assert_close(rope.unrotate(turned, *table), keys, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "'dynamic' is not one of"),
        ({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0]}, "'longrope' is not one of"),
        ({"type": "su", "rope_theta": 1e4}, "'su' is not one of"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "'linear' cannot be had.*'factor'"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "'llama3' cannot be had.*low_freq_factor"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}, "'linear' cannot be had"),
        ({"rope_type": "default", "rope_theta": 0.0}, "'default' cannot be had"),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, "from layer to layer"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused(parameters: dict[str, object], message: str) -> None:
    config = SimpleNamespace(num_attention_heads=4, hidden_size=256, rope_parameters=parameters)
    with pytest.raises(ValueError, match=f"{message}.*Rope.none"):
        Rope.from_config(config)


def test_real_configurations_that_are_refused() -> None:
    with pytest.raises(ValueError, match="from layer to layer"):
        Rope.from_config(config_of("gemma3", "Gemma3Text", head_dim=HEAD_DIM))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="dynamic"):
        Rope.from_config(config_of("llama", "Llama", rope_parameters=dynamic))


def test_models_without_rope() -> None:
    assert Rope.from_config(SimpleNamespace(num_attention_heads=4, hidden_size=256)) == Rope.none(64)
    assert Rope.from_config(SimpleNamespace(num_attention_heads=4, hidden_size=9, head_dim=40)) == Rope.none(40)
    partial = {"rope_theta": 1e4, "partial_rotary_factor": 0.0}
    assert (
        Rope.from_config(SimpleNamespace(num_attention_heads=4, head_dim=64, rope_parameters=partial)).rotary_dim == 0
    )


def test_configurations_of_older_versions() -> None:
    """The base at the top, the kind as `type`."""
    config = SimpleNamespace(
        num_attention_heads=4,
        hidden_size=256,
        rope_theta=1e4,
        rope_scaling={"type": "linear", "factor": 4.0},
        partial_rotary_factor=0.5,
    )
    rope = Rope.from_config(config)
    assert rope.rotary_dim == 32
    assert rope.inv_freq == pytest.approx([1e4 ** (-i / 16) / 4 for i in range(16)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 32, (1.0,) * 15), "rotary_dim=32 with 15 frequencies and head_dim=64"),
        ((64, 66, (1.0,) * 33), "at most head_dim"),
        ((64, 3, (1.0,)), "twice the number"),
        ((64, 2, (math.nan,)), "not finite"),
        ((64, 2, (math.inf,)), "not finite"),
    ],
)
def test_what_is_no_rope_is_refused(arguments: tuple[int, int, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rope(*arguments)


ropes = st.builds(
    lambda head_dim, pairs, base, interleaved: Rope(
        head_dim,
        2 * min(pairs, head_dim // 2),
        tuple(base ** (-i / max(1, pairs)) for i in range(min(pairs, head_dim // 2))),
        interleaved,
    ),
    st.integers(1, 80),
    st.integers(0, 40),
    st.sampled_from([1.5, 1e4, 5e5]),
    st.booleans(),
)


@given(rope=ropes, first=st.integers(0, 1 << 20), exponent=st.integers(-100, 100), seed=st.integers(0, 99))
def test_turning_keeps_lengths_and_is_undone(rope: Rope, first: int, exponent: int, seed: int) -> None:
    """To 2**-22 of a vector's length: less than half of what the codec's guarantee counts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, rope.head_dim, generator=generator) * 2.0**exponent
    table = rope.table(torch.arange(first, first + 3))
    turned = rope.rotate(x, *table)
    length = x.double().norm(dim=-1)
    assert (((turned.double().norm(dim=-1) - length) / length).abs() < 2**-22).all()
    assert ((turned_back(turned, rope, first) - x.double()).norm(dim=-1) < 2**-22 * length).all()
    assert ((rope.unrotate(turned, *table).double() - x.double()).norm(dim=-1) < 2**-21.5 * length).all()
    assert turned[..., rope.rotary_dim :].equal(x[..., rope.rotary_dim :])


def test_the_table_is_float64_rounded() -> None:
    """At large positions, where angles made in float32 are off by whole turns."""
    rope = Rope(4, 4, (1.0, 0.1234567))
    positions = torch.tensor([0, 1, 123456, (1 << 40) + 1])
    cos, sin = rope.table(positions)
    assert (cos.dtype, cos.shape) == (torch.float32, (4, 2))
    for row, position in enumerate(positions.tolist()):
        for column, frequency in enumerate(rope.inv_freq):
            assert float(cos[row, column]) == pytest.approx(math.cos(position * frequency), abs=2**-24)
            assert float(sin[row, column]) == pytest.approx(math.sin(position * frequency), abs=2**-24)
