"""The operators that vLLM's CPU engine takes from its compiled extension, in plain PyTorch: enough for dense decoders.

vLLM's wheel for CUDA has no CPU kernels. With these defined, its whole engine (scheduler, managers, connectors, worker,
model) runs on any machine. Where there is a GPU, this defines nothing.
"""

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.functional import scaled_dot_product_attention

_LIBRARY = Library("_C", "FRAGMENT")


def _define(schema: str, function: object) -> None:
    name = schema.split("(")[0]
    if torch.cuda.is_available() or hasattr(torch.ops._C, name):
        return
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def _scheduler_metadata(*_: object) -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def _write_kv(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, isa: str, k: float, v: float, dtype: str
) -> None:
    """Put each token's key and value `[tokens, heads, dim]` into the caches `[blocks, heads, tokens, dim]`."""
    wanted = slots >= 0
    places = slots[wanted]
    block, row = places // keys.shape[2], places % keys.shape[2]
    keys[block, :, row] = key[: len(slots)][wanted].to(keys.dtype)
    values[block, :, row] = value[: len(slots)][wanted].to(values.dtype)


def _gather(cache: Tensor, blocks: Tensor, tokens: int, repeats: int) -> Tensor:
    """float32 `[query heads, tokens, dim]` of one sequence."""
    flat = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :tokens]
    return flat.repeat_interleave(repeats, 0).float()


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, starts: Tensor, lengths: Tensor, scale: float,
    causal: bool, alibi: Tensor | None, window: int, tables: Tensor, softcap: float, metadata: Tensor,
    sinks: Tensor | None, dynamic: Tensor | None, k: float, v: float, dtype: str,
) -> None:  # fmt: skip
    """Attention of each sequence's new tokens over all of its tokens so far."""
    for number, length in enumerate(lengths.tolist()):
        first, last = int(starts[number]), int(starts[number + 1])
        new = last - first
        if not new:
            continue
        blocks = tables[number, : -(-length // keys.shape[2])].long()
        repeats = query.shape[1] // keys.shape[1]
        positions = torch.arange(length)
        ahead = torch.arange(length - new, length)[:, None] - positions[None, :]
        mask = ahead >= 0
        if window > 0:
            mask &= ahead < window
        found = scaled_dot_product_attention(
            query[first:last].transpose(0, 1).float(),
            _gather(keys, blocks, length, repeats),
            _gather(values, blocks, length, repeats),
            attn_mask=mask if causal else None,
            scale=scale,
        )
        out[first:last] = found.transpose(0, 1).to(out.dtype)


def _slot_mapping(starts: Tensor, positions: Tensor, tables: Tensor, slots: Tensor, block_size: int) -> None:
    total = int(starts[-1])
    request = torch.repeat_interleave(torch.arange(len(starts) - 1), (starts[1:] - starts[:-1]).long())
    place = positions[:total].long()
    slots[:total] = tables[request, place // block_size].long() * block_size + place % block_size
    slots[total:] = -1


_define("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
_define(
    "get_scheduler_metadata(int a, int b, int c, int d, Tensor e, ScalarType f, Tensor g, bool h, int i, str j, bool k,"
    ' Tensor? l, str m="auto") -> Tensor',
    _scheduler_metadata,
)
_define(
    "cpu_attn_reshape_and_cache(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, str isa,"
    " float k, float v, str dtype) -> ()",
    _write_kv,
)
_define(
    "cpu_attention_with_kv_cache(Tensor query, Tensor keys, Tensor values, Tensor(a!) out, Tensor starts,"
    " Tensor lengths, float scale, bool causal, Tensor? alibi, int window, Tensor tables, float softcap,"
    " Tensor metadata, Tensor? sinks, Tensor? dynamic, float k, float v, str dtype) -> ()",
    _attention,
)
_define(
    "compute_slot_mapping_kernel_impl(Tensor starts, Tensor positions, Tensor tables, Tensor(a!) slots, int n) -> ()",
    _slot_mapping,
)
_define("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1).view(-1))
