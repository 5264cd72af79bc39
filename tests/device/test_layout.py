"""Which bytes a copy moves, found from strides: checked against what the runs would copy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.device.layout import Rows, check_pair, is_plain, overlap, rows_of


def move(dst, src, rows):
    """What a copy of `rows` does, on the bytes of the storages."""
    to, of = (torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()) for tensor in (dst, src))
    start = [tensor.storage_offset() * tensor.element_size() for tensor in (dst, src)]
    for row in range(rows.number):
        at, from_ = start[0] + row * rows.dst_pitch, start[1] + row * rows.src_pitch
        to[at : at + rows.width] = of[from_ : from_ + rows.width]


def bits(tensor):
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


@st.composite
def strided(draw):
    """Two tensors of one shape and dtype, cut and permuted from larger ones."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.complex64]))
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    tensors = []
    for seed in range(2):
        if seed and draw(st.booleans()):
            order = draw(st.permutations(range(len(shape))))
        extra = [draw(st.integers(0, 2)) for _ in shape]
        inner = [shape[dim] + extra[dim] for dim in order]
        count = max(1, int(torch.tensor(inner).prod()))
        whole = torch.arange(count * 8, dtype=torch.int64).mul_(seed * 7 + 3).to(torch.uint8)
        whole = whole[: count * dtype.itemsize].view(dtype).view(inner)
        view = whole.permute([order.index(dim) for dim in range(len(shape))])
        tensors.append(view[tuple(slice(0, extent) for extent in shape)])
    return tensors


@given(strided())
def test_runs_move_what_copy_moves(pair):
    dst, src = pair
    check_pair(dst, src)
    rows = rows_of(dst, src)
    if rows is None:
        return
    wanted = dst.clone().copy_(src)
    move(dst, src, rows)
    assert bits(dst).equal(bits(wanted))
    assert rows.number * rows.width == dst.nbytes


@pytest.mark.parametrize(
    ("dst", "src", "rows"),
    [
        (torch.zeros(4, 6), torch.zeros(4, 6), Rows(1, 96, 96, 96)),
        (torch.zeros(6, 4).t(), torch.zeros(6, 4).t(), Rows(1, 96, 96, 96)),
        (torch.zeros(4, 8)[:, :6], torch.zeros(4, 6), Rows(4, 24, 32, 24)),
        (torch.zeros(2, 2, 8)[..., :6], torch.zeros(2, 2, 6), Rows(4, 24, 32, 24)),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(4, 8)[:, ::2], Rows(16, 4, 8, 8)),
        (torch.zeros(4, 4), torch.zeros(4, 4).t(), None),
        (torch.zeros(3, 4, 8)[:, :3, :6], torch.zeros(3, 3, 6), None),
        (torch.zeros(4, 6), torch.zeros(6).expand(4, 6), None),
        (torch.zeros(()), torch.zeros(()), Rows(1, 4, 4, 4)),
        (torch.zeros(1, 5)[:, 2:3], torch.zeros(1, 1), Rows(1, 4, 4, 4)),
        (torch.zeros(0, 3), torch.zeros(0, 3), Rows(1, 0, 0, 0)),
    ],
)
def test_runs_and_rows(dst, src, rows):
    assert rows_of(dst, src) == rows


def test_a_pitch_beyond_what_cuda_takes_is_left_to_copy():
    far = torch.as_strided(torch.empty((1 << 31) + 64, dtype=torch.uint8, device="meta"), (2, 8), (1 << 31, 1))
    assert rows_of(far, torch.zeros(2, 8, dtype=torch.uint8)) is None


@pytest.mark.parametrize(
    ("dst", "src", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int32), ValueError, "torch.float32 and src is torch.int32"),
        (torch.zeros(3), torch.zeros(4), ValueError, r"\[3\] and src \[4\]"),
        (torch.zeros(2, 3), torch.zeros(3), ValueError, "broadcast"),
        (torch.zeros(3).expand(2, 3), torch.zeros(2, 3), ValueError, "share memory"),
        (torch.as_strided(torch.zeros(9), (3, 3), (2, 1)), torch.zeros(3, 3), ValueError, "share memory"),
        (torch.zeros(3, device="meta"), torch.zeros(3), ValueError, "on meta"),
        (torch.zeros(3).to_sparse(), torch.zeros(3), TypeError, "sparse"),
        ([1.0], torch.zeros(1), TypeError, "list"),
    ],
)
def test_refuses_what_is_no_copy_of_values(dst, src, error, message):
    with pytest.raises(error, match=message):
        check_pair(dst, src)


def test_an_expanded_source_is_no_offence():
    check_pair(torch.zeros(2, 3), torch.zeros(3).expand(2, 3))


def overlapping(dst, src):
    return overlap(dst, src, rows_of(dst, src))


def test_overlap():
    x = torch.zeros(10, 8)
    assert overlapping(x, x)
    assert overlapping(x[1:], x[:-1])
    assert not overlapping(x[:5], x[5:])
    assert not overlapping(x[:, :4], x[:, 4:])
    assert not overlapping(x[:, 4:], x[:, :4])
    assert overlapping(x[:, :5], x[:, 3:])
    assert overlapping(x[1:, :5], x[:-1, 3:])
    assert overlapping(x[::2, :4], x[1::2, :4].flip(0)[:5]) is False  # flip copies
    assert overlapping(x[:8].t(), x[:8])
    assert not overlapping(torch.zeros(3), torch.zeros(3))
    assert not overlapping(x[:0], x[:0])


def test_plain():
    x = torch.zeros(3, dtype=torch.complex64)
    assert is_plain(x, x.clone())
    assert not is_plain(x, x.clone().conj())
    assert is_plain(x.conj(), x.clone().conj())
    assert not is_plain(torch.zeros(3), x.conj().imag)
    parameter = torch.zeros(3, requires_grad=True)
    assert not is_plain(parameter, torch.zeros(3))
    with torch.no_grad():
        assert is_plain(parameter, torch.zeros(3))
