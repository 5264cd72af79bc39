// A tile's bytes: where they are, and those of tiles that are raw. Behind common.cu.

// Where tiles come from. Slots: chunk c from `slots + slot_index[c] * slot_bytes`, checked against `facts` and `identities`; status of
// chunk c. One payload: tile i from `slots + starts[i]`, sizes[i] bytes; status of tile i.
struct Input {
    const u8 *slots;
    i64 slot_bytes;
    const int *slot_index;
    const u64 *identities;
    const i64 *starts;
    const int *sizes;
    int *status;
    SlotFacts facts;
};

constexpr int NUM_BLOCKS = TILE_TOKENS / GROUP;
// Of rANS words (a window that moves on, for tiles that have more) or of packed groups (those that are longer are read from memory).
constexpr int STAGE_WORDS = ANS ? 1024 : 2048;

__device__ __forceinline__ u32 get_small(const u8 *in, int index, int code) {
    switch (code) {
    case 0: return 0;
    case 1: return in[index >> 1] >> (4 * (index & 1)) & 15;
    case 2: return in[index];
    case 3: return ((const u16 *)in)[index];
    default: return ((const u32 *)in)[index];
    }
}

// The lossless value: `exponent` above, and the bits and bytes kept raw.
__device__ __forceinline__ u32 join(int value, u32 plane_bytes) {
    u32 joined = ((u32)value & ((1u << LOW_BITS) - 1)) << (8 * PLANES) | plane_bytes;
    u32 exponent = (u32)(-(value >> LOW_BITS)) & EXPONENT_MASK;
    return (joined >> KVF_MANTISSA) << TOP_BIT | exponent << KVF_MANTISSA | (joined & MANTISSA_MASK);
}

// Checks a slot's header and finds a tile in it; all lanes return the same. SlotStatus.
__device__ __forceinline__ int find_tile(const Source &s, const Input &input, const Tile &tile, const u8 *&in, int &size, u32 &checksum, int lane) {
    const u8 *slot = input.slots + input.slot_index[tile.chunk] * input.slot_bytes;
    const u64 *identity = input.identities + 2 * tile.chunk;
    const u32 *directory = (const u32 *)(slot + SLOT_HEADER);
    u32 v = 0;
    if (lane < 16) v = ((const u32 *)slot)[lane];
    else if (lane == 16) v = tile.local ? directory[2 * tile.local - 2] : 0;
    else if (lane < 19) v = directory[2 * tile.local + lane - 17];
    const u64 sum = warp_sum64(lane < 15 ? hash_term(v, lane) : 0);
    const auto at = [&](int i) { return __shfl_sync(FULL, v, i); };
    const i64 payload_at = SLOT_HEADER + 8 * (i64)s.tiles_per_chunk;
    const u32 state = at(3);
    if (at(0) != SLOT_MAGIC || at(1) != (SLOT_VERSION | SLOT_HEADER << 16) || at(15) != hash_end(sum) || (at(13) | at(14) | state >> 24) ||
        ((state & 255) != USABLE && (state & 255) != REJECTED))
        return FOREIGN;
    if (at(2) != input.facts.kind || (state >> 16 & 255) != input.facts.relative_to || at(7) != input.facts.layout_digest ||
        at(12) != input.facts.tokens || at(4) != (u32)s.tiles_per_chunk)
        return MISMATCH;
    if (at(8) != (u32)identity[0] || at(9) != (u32)(identity[0] >> 32) || at(10) != (u32)identity[1] || at(11) != (u32)(identity[1] >> 32))
        return OTHER_IDENTITY;
    if ((state & 255) != USABLE) return NOT_USABLE;
    const u32 payload = at(5), begin = at(16), end = at(17);
    checksum = at(18);
    if (payload_at + payload > input.slot_bytes || begin > end || end > payload || (tile.local + 1 == s.tiles_per_chunk && end != payload) || (begin | end) % 4 || end - begin < 4) return CORRUPT;
    in = slot + payload_at + begin;
    size = (int)(end - begin);
    return GOOD;
}

__device__ __noinline__ bool read_raw(int index, const u8 *in, int lane) {
    const Source &s = the_source;
    const Tile tile(s, index);
    const int row_bytes = tile.channels * KVF_ITEM;
    const u64 alignment = (u64)tile.start | (u64)tile.page_bytes | (u64)tile.token_bytes | (u64)row_bytes;
    if (tile.channel_bytes == KVF_ITEM && alignment % 4 == 0) {
        const int row_words = row_bytes / 4;
        const u32 *words = (const u32 *)(in + 4);
#pragma unroll 1
        for (int t0 = 0; t0 < tile.tokens; t0 += 8) {  // eight tokens share a page
            u8 *row = tile.row(s, t0);
            if (!row) continue;
            for (int c = lane; c < row_words; c += 32) {
                u32 batch[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) batch[i] = t0 + i < tile.tokens ? words[(t0 + i) * row_words + c] : 0;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (t0 + i < tile.tokens) ((u32 *)(row + i * tile.token_bytes))[c] = batch[i];
            }
        }
    } else {
        const word_t *values = (const word_t *)(in + 4);
        for (int i = lane; i < tile.tokens * tile.channels; i += 32) {
            word_t *p = tile.value(s, i);
            if (p) *p = values[i];
        }
    }
    return true;
}
