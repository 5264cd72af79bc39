"""Moments and bases against direct computation."""

import pytest
import torch

from kvferry.calibration.basis import deviations, heads_of_a_group, klt, profile_of
from kvferry.calibration.moments import Moments, group_rows, ungroup_rows
from kvferry.codecs.transform.rope import Rope
from kvferry.evaluation import prefill


def test_grouping_puts_the_heads_of_a_token_side_by_side():
    x = torch.randn(6, 5, 4)
    for group_heads in (1, 2, 3, 6):
        rows = group_rows(x, group_heads)
        assert rows.shape == (6 // group_heads, 5, 4 * group_heads)
        assert rows[0, 3].equal(torch.cat([x[head, 3] for head in range(group_heads)]))
        assert ungroup_rows(rows, group_heads).equal(x)


@pytest.mark.parametrize("group_heads", [1, 2])
def test_moments_are_those_of_all_tokens(source, group_heads):
    windows = [source.documents[0][:150], source.documents[1][:150]]
    rope = Rope.from_config(source.model.config)
    moments = Moments.zeros(4, 2 // group_heads, group_heads * 64)
    caches = [prefill(source.model, window[None]) for window in windows]
    for cache in caches:
        moments.add(cache, rope)
    assert moments.tokens == 300
    cos, sin = rope.table(torch.arange(150))
    for layer in (0, 3):
        keys = [rope.unrotate(cache.layers[layer].keys[0].float(), cos, sin) for cache in caches]
        values = [cache.layers[layer].values[0] for cache in caches]
        for side, parts in enumerate((keys, values)):
            rows = torch.cat([group_rows(part.double(), group_heads) for part in parts], 1)
            assert torch.allclose(moments.mean(layer, side), rows.mean(1), rtol=1e-12, atol=1e-13)
            for group, covariance in zip(rows, moments.covariance(layer, side), strict=True):
                assert torch.allclose(covariance, torch.cov(group.T, correction=0), rtol=1e-9, atol=1e-11)
            about = (rows - rows.mean(1, keepdim=True)).square().mean().sqrt()
            assert moments.deviation(layer, side) == pytest.approx(float(about))


def test_keys_taken_back_are_alike_at_all_positions(source):
    """Why RoPE is taken off: the same channels then carry the same, and fewer coefficients most of the variance."""
    cache = prefill(source.model, source.documents[0][None, :400])

    def share(rope):
        moments = Moments.zeros(4, 1, 128)
        moments.add(cache, rope)
        variances = torch.linalg.eigvalsh(moments.covariance(0, 0))[0].flip(0)
        return float(variances[:32].sum() / variances.sum())

    assert share(Rope.from_config(source.model.config)) > share(Rope.none(64)) + 0.05


def test_values_that_are_not_finite_are_refused(source):
    cache = prefill(source.model, source.documents[0][None, :70])
    cache.layers[2].values = cache.layers[2].values.clone()
    cache.layers[2].values[0, 1, 3, 5] = torch.inf
    with pytest.raises(ValueError, match="layer 2 v holds values that are not finite"):
        Moments.zeros(4, 1, 128).add(cache, Rope.from_config(source.model.config))


def test_the_klt_decorrelates_in_order_of_variance():
    rows = torch.randn(2, 500, 8, dtype=torch.float64) @ torch.randn(2, 8, 8, dtype=torch.float64)
    covariance = torch.stack([torch.cov(group.T) for group in rows])
    basis = klt(covariance)
    for group, vectors in zip(rows, basis, strict=True):
        turned = torch.cov((group @ vectors).T)
        assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-9)
        assert turned.diagonal().diff().le(0).all()
        assert torch.allclose(vectors.T @ vectors, torch.eye(8, dtype=torch.float64), atol=1e-12)
    assert klt(covariance).equal(basis)


@pytest.mark.parametrize(
    ("heads", "head_dim", "scope", "expected"),
    [
        (2, 64, "auto", 2),
        (8, 128, "auto", 8),
        (16, 128, "auto", 8),
        (12, 128, "auto", 6),
        (7, 256, "auto", 1),
        (8, 128, "layer", 8),
        (8, 128, "head", 1),
    ],
)
def test_groups_divide_the_heads_and_fit_the_codec(heads, head_dim, scope, expected):
    assert heads_of_a_group(heads, head_dim, scope) == expected


def test_groups_that_the_codec_cannot_take_are_refused():
    with pytest.raises(ValueError, match="16 heads of 128 channels do not fit"):
        heads_of_a_group(16, 128, "layer")
    with pytest.raises(ValueError, match="scope='token'"):
        heads_of_a_group(16, 128, "token")


def test_a_constant_side_has_a_basis_and_a_step():
    moments = Moments.zeros(1, 1, 4)
    rows = torch.randn(50, 4, dtype=torch.float64)
    for side, x in enumerate((rows, torch.full((50, 4), 3.0, dtype=torch.float64))):
        moments.sums[0, side, 0] = x.sum(0)
        moments.products[0, side, 0] = x.T @ x
    moments.tokens = 50
    (k, v) = deviations(moments)[0]
    assert k > 0.5
    assert 0 < v <= 1e-5
    profile = profile_of(moments, heads=2, head_dim=2, rope=Rope.none(2))
    assert profile.group_heads == 2
    assert profile.layers[0].v.mean.equal(torch.full((1, 4), 3.0))
