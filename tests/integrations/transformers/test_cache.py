"""transformers caches through the store: exact continuation, bounds, every layer type, and what is refused."""

import copy
import math

import pytest
import torch

import kvferry
from kvferry.errors import CorruptFrame
from kvferry.store import HostStore

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from kvferry.integrations.transformers import EncodedCache, decode_cache, encode_cache  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW = 16


def _llama(dtype):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, head_dim=16)).to(dtype)


def _qwen2(dtype):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)).to(dtype)


def _mistral(dtype):
    config = transformers.MistralConfig(**SMALL, head_dim=16, sliding_window=WINDOW)
    return transformers.MistralForCausalLM(config).to(dtype)


def _gpt2(dtype):
    config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    return transformers.GPT2LMHeadModel(config).to(dtype)


MODELS = {"llama": _llama, "qwen2": _qwen2, "mistral-sliding": _mistral, "gpt2": _gpt2}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param](torch.bfloat16).eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prefill(model, ids):
    return model(input_ids=ids, use_cache=True).past_key_values


@torch.no_grad()
def step(model, ids, cache):
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def through_store(cache, codec):
    store = HostStore(1 << 24)
    store.put_cache("prefix", cache, codec)
    restored = store.restore_cache("prefix", "cpu")
    store.check_integrity()
    return restored


def pairs(left, right):
    for a, b in zip(left.layers, right.layers, strict=True):
        yield a.keys, b.keys
        yield a.values, b.values


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [5, WINDOW - 1, WINDOW, 50])
def test_lossless_continues_bit_for_bit(model, batch, length):
    cache = prefill(model, tokens(batch, length))
    restored = through_store(cache, kvferry.Lossless())
    for chunk in (tokens(batch, 7, 2), tokens(batch, 1, 3), tokens(batch, 1, 4)):
        assert torch.equal(step(model, chunk, restored), step(model, chunk, cache))
    for a, b in pairs(cache, restored):
        assert torch.equal(a, b)


def test_every_attribute_of_a_layer_comes_back(model):
    cache = prefill(model, tokens(2, 40))
    restored = through_store(cache, kvferry.Lossless(packing="bitpack"))
    assert type(restored) is DynamicCache
    assert restored.layer_class_to_replicate is cache.layer_class_to_replicate
    assert restored.get_seq_length() == cache.get_seq_length() == 40
    for a, b in zip(cache.layers, restored.layers, strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_generate_goes_on_from_a_restored_cache(model):
    ids = tokens(1, 30)
    cache = prefill(model, ids[:, :-1])
    restored = through_store(cache, kvferry.Lossless())
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(model.generate(ids, past_key_values=restored, **settings), expected)


@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier"])
def test_bounded_keeps_its_bound(model, mode):
    cache = prefill(model, tokens(2, 70))
    store = HostStore(1 << 24)
    entry = store.put_cache("prefix", cache, kvferry.Bounded(error_bound=0.02, mode=mode))
    restored = store.restore_cache("prefix")
    for (a, b), frame in zip(pairs(cache, restored), entry.frames, strict=True):
        used = kvferry.inspect(frame).bound_used
        assert 0 < used <= 0.02 * float(a.double().max() - a.double().min())
        assert float((a.double() - b.double()).abs().max()) <= used
    assert entry.raw_bytes == sum(a.numel() * a.element_size() for a, _ in pairs(cache, cache))
    assert store.stats().used_bytes == sum(map(len, entry.frames))


def test_a_codec_can_be_chosen_per_layer_and_tensor(model):
    cache = prefill(model, tokens(1, 40))
    asked = []

    def choose(layer_index, which, tensor):
        asked.append((layer_index, which, tuple(tensor.shape)))
        return kvferry.Lossless() if which == "k" else kvferry.Bounded(error_bound=0.1, relative=False)

    entry = HostStore(1 << 24).put_cache("prefix", cache, choose)
    assert [kvferry.inspect(frame).codec for frame in entry.frames] == ["lossless", "bounded"] * len(cache.layers)
    assert asked[:2] == [(0, "k", tuple(cache.layers[0].keys.shape)), (0, "v", tuple(cache.layers[0].values.shape))]


def test_nothing_is_shared_and_the_callers_cache_is_unchanged(model):
    cache = prefill(model, tokens(2, 40))
    before = copy.deepcopy(cache)
    store = HostStore(1 << 24)
    store.put_cache("prefix", cache, kvferry.Raw())
    for a, b in pairs(cache, before):
        assert torch.equal(a, b)
        a.fill_(math.nan)
    first = store.restore_cache("prefix")
    for a, b in pairs(first, before):
        assert torch.equal(a, b)
        a.zero_()
    for a, b in pairs(store.restore_cache("prefix"), before):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", MODELS)
def test_lossless_continues_bit_for_bit_on_the_gpu(name):
    torch.manual_seed(0)
    model = MODELS[name](torch.bfloat16).eval().to("cuda")
    cache = prefill(model, tokens(2, 50).to("cuda"))
    store = HostStore(1 << 24)
    store.put_cache("prefix", cache, kvferry.Lossless())
    restored = store.restore_cache("prefix")
    assert restored.layers[0].keys.device == cache.layers[0].keys.device
    assert store.restore_cache("prefix", "cpu").layers[0].keys.device.type == "cpu"
    for chunk in (tokens(2, 7, 2).to("cuda"), tokens(2, 1, 3).to("cuda")):
        assert torch.equal(step(model, chunk, restored), step(model, chunk, cache))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    model = _mistral(dtype).eval()
    cache = prefill(model, tokens(1, 33))
    restored = through_store(cache, kvferry.Lossless())
    assert restored.layers[0].keys.dtype == dtype
    assert torch.equal(step(model, tokens(1, 3, 2), restored), step(model, tokens(1, 3, 2), cache))


def test_a_cache_from_a_forward_with_grad_is_stored():
    model = _llama(torch.float32)
    cache = model(input_ids=tokens(1, 9), use_cache=True).past_key_values
    assert cache.layers[0].keys.requires_grad
    restored = through_store(cache, kvferry.Lossless())
    assert torch.equal(restored.layers[0].keys, cache.layers[0].keys)
    assert not restored.layers[0].keys.requires_grad


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_empty_caches(name):
    model = MODELS[name](torch.bfloat16).eval()
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        restored = through_store(cache, kvferry.Lossless())
        assert restored.get_seq_length() == 0
        assert len(restored.layers) == len(cache.layers)
        ids = tokens(1, 20)
        assert torch.equal(step(model, ids, restored), step(model, ids, cache))


def test_a_cache_whose_later_layers_are_not_initialised():
    model = _mistral(torch.bfloat16).eval()
    cache = DynamicCache(config=model.config)
    key, value = torch.randn(2, 1, 2, 30, 16).to(torch.bfloat16)
    cache.update(key, value, 0)
    restored = through_store(cache, kvferry.Lossless())
    assert restored.layers[0].is_initialized
    assert not restored.layers[1].is_initialized
    assert torch.equal(restored.layers[0].keys, cache.layers[0].keys)


def test_a_cache_cropped_to_nothing():
    cache = prefill(_llama(torch.bfloat16), tokens(1, 6))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    restored = through_store(cache, kvferry.Bounded(error_bound=0.1))
    assert restored.layers[0].keys.shape == (1, 2, 0, 16)


def test_static_and_other_caches_are_refused_with_a_remedy():
    model = _llama(torch.bfloat16)
    cache = prefill(model, tokens(1, 4))
    store = HostStore(1 << 20)
    refused = {
        "StaticCache": transformers.StaticCache(config=model.config, max_cache_len=8),
        "EncoderDecoderCache": transformers.EncoderDecoderCache(cache, DynamicCache()),
        "old tuple form": tuple((layer.keys, layer.values) for layer in cache.layers),
        "offloading": DynamicCache(offloading=True),
        "NoneType": None,
    }
    for message, unsupported in refused.items():
        with pytest.raises(TypeError, match=message):
            store.put_cache("prefix", unsupported, kvferry.Lossless())
    assert len(store) == 0


def test_layers_that_keep_more_than_kv_are_refused():
    class OwnLayer(type(DynamicCache().layer_class_to_replicate())):
        pass

    cache = DynamicCache()
    cache.layers.append(OwnLayer())
    with pytest.raises(TypeError, match="layer 0 of the cache is a OwnLayer"):
        encode_cache(cache, kvferry.Lossless())
    cache = prefill(_llama(torch.bfloat16), tokens(1, 4))
    cache.layers[1].extra = torch.zeros(3)
    with pytest.raises(TypeError, match="layer 1 of the cache keeps extra, a Tensor"):
        encode_cache(cache, kvferry.Lossless())


def test_a_codec_by_name_is_refused():
    with pytest.raises(TypeError, match=r"kvferry\.Lossless"):
        encode_cache(DynamicCache(), "lossless")


def test_a_damaged_frame_is_freed_and_then_a_miss():
    store = HostStore(1 << 24)
    entry = store.put_cache("prefix", prefill(_llama(torch.bfloat16), tokens(1, 20)), kvferry.Lossless())
    damaged = [*entry.frames[:-1], entry.frames[-1][:-1] + bytes([entry.frames[-1][-1] ^ 1])]
    store.put("prefix", damaged, raw_bytes=entry.raw_bytes, metadata=entry.metadata)
    with pytest.raises(CorruptFrame):
        store.restore_cache("prefix")
    assert store.stats().corrupt == 1
    with pytest.raises(KeyError, match="no entry under key 'prefix'"):
        store.restore_cache("prefix")
    store.check_integrity()


def test_frames_of_another_shape_are_refused():
    encoded = encode_cache(prefill(_llama(torch.bfloat16), tokens(1, 20)), kvferry.Lossless())
    other = encode_cache(prefill(_llama(torch.bfloat16), tokens(1, 21)), kvferry.Lossless())
    with pytest.raises(CorruptFrame, match="layer 0 holds"):
        decode_cache(EncodedCache(other.frames, other.raw_bytes, encoded.layout))


def test_an_entry_that_is_no_cache_is_refused():
    store = HostStore(1 << 20)
    store.put("bytes", [b"abc"])
    with pytest.raises(TypeError, match="does not hold a cache"):
        store.restore_cache("bytes")
