"""Lines of every layout address what the engine put there; what no kernel could address is refused."""

import struct
from collections.abc import Callable

import pytest
import torch
import xxhash
from torch import Tensor

from contract.cases import bits_of
from contract.slot_cases import LAYOUTS, Engine
from kvferry import PagedKV


def numbered(engine: Engine) -> Tensor:
    """A number of its own in every place: float32 holds them exactly."""
    shape = engine.shape
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("head_dim", [1, 40, 128, 200, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lines_are_the_heads_in_order(layout: str, head_dim: int) -> None:
    engine = Engine(layout, torch.float32, pages=3, page_tokens=8, head_dim=head_dim)
    values = numbered(engine)
    engine.write(values)
    lines = engine.kv.lines
    per_head = len(lines) // len(values)
    assert per_head == -(-head_dim // 128)
    for row, head in enumerate(values):
        mine = lines[row * per_head : (row + 1) * per_head]
        assert torch.equal(torch.cat(mine, 2), head)
        assert all(line.shape[2] == mine[0].shape[2] % 129 and line.shape[2] % 16 == 0 for line in mine[:-1])
    assert engine.kv.channels == tuple(line.shape[2] for line in lines)
    assert engine.kv.num_lines == len(lines)
    assert (engine.kv.num_pages, engine.kv.page_tokens) == (3, 8)
    assert engine.kv.page_bytes == values.nbytes // 3
    assert engine.kv.dtype == torch.float32
    assert engine.kv.device == torch.device("cpu")
    assert not engine.kv.is_opaque


def test_rows_are_layer_then_kv_then_head() -> None:
    """Written down once without the helper."""
    layer = torch.arange(2 * 4 * 8 * 3 * 5).view(2, 4, 8, 3, 5).float()
    kv = PagedKV.kv_first([layer, layer + 1000])
    expected = [x[half, :, :, head] for x in (layer, layer + 1000) for half in (0, 1) for head in range(3)]
    assert all(torch.equal(*pair) for pair in zip(kv.lines, expected, strict=True))
    k, v = torch.rand(4, 3, 8, 5), torch.rand(4, 3, 8, 5)
    kv = PagedKV.heads_first([torch.cat([k, v], 3)], 5)
    expected = [half[:, head] for half in (k, v) for head in range(3)]
    assert all(torch.equal(*pair) for pair in zip(kv.lines, expected, strict=True))


def test_lines_are_views() -> None:
    for layout in LAYOUTS:
        engine = Engine(layout, torch.bfloat16)
        for line in engine.kv.lines:
            line.fill_(1.0)
        assert torch.equal(engine.read(), bits_of(torch.ones(engine.shape, dtype=torch.bfloat16)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_lines(layout: str) -> None:
    engine = Engine(layout, torch.float16, head_dim=200)
    table = engine.kv.kernel_lines
    assert (table.dtype, tuple(table.shape)) == (torch.int64, (engine.kv.num_lines, 3))
    for line, (address, page, packed) in zip(engine.kv.lines, table.tolist(), strict=True):
        token, channels = packed & 0xFFFFFFFF, packed >> 32
        assert channels == line.shape[2]
        assert address + 2 * page + 3 * token == line[2, 3].data_ptr()
    assert engine.kv.kernel_lines is table


def test_opaque_bytes() -> None:
    for page_bytes, tokens in (
        (64 * 16, 64),
        (3 * 32 * 16, 32),
        (16 * 16, 16),
        (8 * 16, 8),
        (8 * 3, 8),
        (4096 * 5, 64),
    ):
        layers = [torch.arange(5 * page_bytes).to(torch.uint8).view(5, page_bytes) for _ in range(2)]
        kv = PagedKV.opaque(layers)
        assert kv.is_opaque
        assert (kv.num_pages, kv.page_tokens, kv.page_bytes) == (5, tokens, 2 * page_bytes)
        half = kv.num_lines // 2
        assert torch.equal(torch.cat(kv.lines[:half], 2).flatten(1), layers[0])
    mixed = PagedKV.opaque([torch.zeros(5, 64 * 16, dtype=torch.uint8), torch.zeros(5, 16 * 16, dtype=torch.uint8)])
    assert mixed.page_tokens == 16
    assert set(mixed.channels) == {64, 16}


def test_layout_digest_says_what_slots_depend_on() -> None:
    def digest(layout: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> int:
        return Engine(layout, dtype, **sizes).kv.layout_digest

    assert digest("heads_first") == digest("kv_first") == digest("strided") == digest("plain", pages=4)
    changed = [
        digest("heads_first", torch.float16),
        digest("heads_first", page_tokens=8),
        digest("heads_first", layers=1),
        digest("heads_first", heads=3),
        digest("heads_first", head_dim=39),
        digest("mla"),
        PagedKV.opaque([torch.zeros(3, 1024, dtype=torch.uint8)]).layout_digest,
    ]
    assert len({digest("heads_first"), *changed}) == len(changed) + 1
    assert all(0 <= number < 1 << 32 for number in changed)
    said = struct.pack("<10I", 1, 16, *[24] * 8)  # bfloat16, page_tokens, the channels of the lines
    assert digest("heads_first") == xxhash.xxh3_64_intdigest(said) & 0xFFFFFFFF


def paged(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "no layers": (ValueError, "at least one layer", lambda: PagedKV.kv_first([])),
    "no lines": (ValueError, "at least one layer", lambda: PagedKV(())),
    "not a tensor": (TypeError, "list", lambda: PagedKV.kv_first([[1.0]])),
    "too few dimensions": (ValueError, "another constructor", lambda: PagedKV.kv_first([paged(2, 4, 8, 5)])),
    "no K and V": (ValueError, r"\(3, 4, 8, 2, 5\)", lambda: PagedKV.kv_first([paged(3, 4, 8, 2, 5)])),
    "K and V elsewhere": (ValueError, "dimension 1", lambda: PagedKV.kv_second([paged(2, 4, 8, 2, 5)])),
    "head_dim": (ValueError, "head_dim=6", lambda: PagedKV.heads_first([paged(4, 2, 8, 10)], 6)),
    "head_dim of 0": (ValueError, "head_dim=0", lambda: PagedKV.heads_first([paged(4, 2, 8, 10)], 0)),
    "page_tokens": (ValueError, "12 tokens.*block size", lambda: PagedKV.heads_only([paged(4, 2, 12, 10)])),
    "partial page": (ValueError, "40 tokens.*page_tokens=16", lambda: PagedKV.plain([paged(2, 40, 10)], 16)),
    "page_tokens of 0": (ValueError, "page_tokens=0", lambda: PagedKV.plain([paged(2, 40, 10)], 0)),
    "dtype": (TypeError, "float64", lambda: PagedKV.heads_only([paged(4, 2, 8, 10, dtype=torch.float64)])),
    "bytes of a float8": (
        TypeError,
        "int8.*float8",
        lambda: PagedKV.heads_only([paged(4, 2, 8, 10, dtype=torch.int8)]),
    ),
    "opaque floats": (TypeError, "view", lambda: PagedKV.opaque([paged(4, 64)])),
    "opaque remainder": (ValueError, "100 bytes.*8", lambda: PagedKV.opaque([paged(4, 100, dtype=torch.uint8)])),
    "opaque and empty": (ValueError, "0 bytes", lambda: PagedKV.opaque([paged(4, 0, dtype=torch.uint8)])),
    "no values": (ValueError, "without values", lambda: PagedKV.heads_only([paged(0, 2, 8, 10)])),
    "channels apart": (
        ValueError,
        "2 elements apart",
        lambda: PagedKV.heads_only([paged(4, 2, 8, 20)[..., ::2]]),
    ),
    "expanded": (ValueError, "share memory", lambda: PagedKV.heads_only([paged(1, 2, 8, 10).expand(4, -1, -1, -1)])),
    "overlapping": (
        ValueError,
        "share memory",
        lambda: PagedKV((paged(400).as_strided((4, 8, 10), (60, 9, 1)),)),
    ),
    "mixed dtypes": (
        ValueError,
        "line 2 .*float16.*line 0 .*bfloat16",
        lambda: PagedKV.heads_only([paged(4, 2, 8, 10), paged(4, 2, 8, 10, dtype=torch.float16)]),
    ),
    "mixed pages": (ValueError, "line 2", lambda: PagedKV.heads_only([paged(4, 2, 8, 10), paged(5, 2, 8, 10)])),
    "wide line": (ValueError, "129 channels", lambda: PagedKV((paged(4, 8, 129),))),
    "flat line": (TypeError, "page_tokens, channels", lambda: PagedKV((paged(4, 8),))),
    "grad": (ValueError, "detach", lambda: PagedKV.heads_only([torch.zeros(4, 2, 8, 10, requires_grad=True)])),
    "negated": (ValueError, "resolve_neg", lambda: PagedKV.heads_only([torch._neg_view(torch.zeros(4, 2, 8, 10))])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    error, message, make = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_layers_may_differ_in_heads_and_width() -> None:
    kv = PagedKV.heads_only([paged(4, 2, 8, 10), paged(4, 1, 8, 200)])
    assert kv.channels == (10, 10, 112, 88)


def test_one_channel_and_one_page_need_no_stride() -> None:
    """Strides of dimensions of size 1 mean nothing."""
    kv = PagedKV((paged(64).as_strided((1, 8, 1), (0, 5, 7)),))
    assert kv.channels == (1,)
