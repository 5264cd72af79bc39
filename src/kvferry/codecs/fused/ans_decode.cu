// `ans` tiles to tensor in one launch. Behind ans_common.cu.

__device__ __forceinline__ u32 join(int value, u32 plane_bytes) {
    u32 joined = ((u32)value & ((1u << LOW_BITS) - 1)) << (8 * PLANES) | plane_bytes;
    u32 exponent = (u32)(-(value >> LOW_BITS)) & EXPONENT_MASK;
    return (joined >> KVF_MANTISSA) << TOP_BIT | exponent << KVF_MANTISSA | (joined & MANTISSA_MASK);
}

__device__ __forceinline__ u32 get_small(const u8 *in, int index, int code) {
    switch (code) {
    case 0: return 0;
    case 1: return in[index >> 1] >> (4 * (index & 1)) & 15;
    case 2: return in[index];
    case 3: return ((const u16 *)in)[index];
    default: return ((const u32 *)in)[index];
    }
}

constexpr int RING_BLOCKS = 4;

struct Stream {
    const u8 *planes;
    const u32 *words;  // two words each
    int num_words;

    __device__ Stream(const u8 *in, int planes_at, int words_at, int count)
        : planes(in + planes_at), words((const u32 *)(in + words_at)), num_words(count) {}
    // Words 64*block + 2*lane and the next one; 0 behind the end.
    __device__ __forceinline__ u32 pair(int block, int lane) const {
        const int i = 32 * block + lane;
        return 2 * i < num_words ? words[i] : 0u;
    }
};

// The tokens of a tile, in order. Returns whether the lane ended as it must. LOW: some channel has raw low bits.
//
// Words come through a ring of four blocks of 64 in shared memory, and a fifth waits in a register: reading them from memory
// when they are needed would put a memory latency into every other step of the chain. A row takes at most 128 words, so the
// ring is filled up once a row.
template <int CPL, bool LOW>
__device__ __forceinline__ bool decode_rows(const Rows<CPL> &rows, const Stream &stream, int tokens, int channels,
                                            const int (&table)[CPL], const int (&shift)[CPL], const int (&base)[CPL],
                                            const float (&step)[CPL], const u32 *const (&low)[CPL], u32 state, const u32 *slots,
                                            u32 *ring, int lane) {
    const u32 below = lanes_before();
    int taken = 0, filled = RING_BLOCKS, code[CPL] = {}, add[CPL];
    u32 table_slots[CPL];
    const u32 slots_address = shared_address(slots), ring_address = shared_address(ring);
    u32 low_mask = 0;
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        add[k] = base[k];
        table_slots[k] = slots_address + table[k] * PROB_SCALE * 4;
        if (LOW) low_mask |= (u32)__any_sync(FULL, shift[k]) << k;
    }
    __syncwarp();
#pragma unroll
    for (int block = 0; block < RING_BLOCKS; ++block) ring[32 * block + lane] = stream.pair(block, lane);
    u32 waiting = stream.pair(RING_BLOCKS, lane);
    __syncwarp();
    for (int t = 0; t < tokens; ++t) {
        while (taken > 64 * (filled - 2)) {  // fewer than 128 words ahead: the oldest block is used up
            __syncwarp();
            ring[32 * (filled % RING_BLOCKS) + lane] = waiting;
            ++filled;
            waiting = stream.pair(filled, lane);
            __syncwarp();
        }
        u32 v[CPL];
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            // slot: symbol (8 bits, signed), frequency (12), bias (12)
            const u32 slot = load_shared(table_slots[k] + 4 * (state & (PROB_SCALE - 1)));
            state = (slot >> 12 & 0xfff) * (state >> PROB_BITS) + (slot & 0xfff);
            const bool need = state < STATE_LOW;
            const u32 mask = __ballot_sync(FULL, need);
            if (need) state = state << 16 | load_shared_u16(ring_address + 2 * ((taken + __popc(mask & below)) % (64 * RING_BLOCKS)));
            taken += __popc(mask);
            int value = (int)slot >> 24;
            if (LOW && (low_mask >> k & 1) && shift[k]) {
                const int bit = t * shift[k];
                const u32 *p = low[k] + (bit >> 5);
                u32 bits = p[0] >> (bit & 31);
                if ((bit & 31) + shift[k] > 32) bits |= p[1] << (32 - (bit & 31));
                value = value * (1 << shift[k]) + (int)(bits & ((1u << shift[k]) - 1)) - (KVF_BOUNDED ? (1 << shift[k]) >> 1 : 0);
            }
            if (KVF_BOUNDED) {
                code[k] = value + add[k] + (DELTA ? code[k] : 0);
                v[k] = as_word(__fmul_rn(whole(code[k]), step[k]));
            } else {
                u32 bytes = 0;
#pragma unroll
                for (int p = 0; p < PLANES; ++p)
                    if (k < rows.count) bytes |= (u32)stream.planes[(p * tokens + t) * channels + lane * CPL + k] << (8 * p);
                v[k] = join(value + base[k] * (1 << LOW_BITS), bytes);
            }
        }
        rows.store(t, v);
        if (DELTA) {  // the base was the first difference's
#pragma unroll
            for (int k = 0; k < CPL; ++k) add[k] = 0;
        }
    }
    return state == STATE_LOW && taken == stream.num_words;
}

template <int CPL>
__device__ bool decode_tile(const Source &dst, int tile, const u8 *in, int size, const u32 *slots, u32 *ring, int lane) {
    const int tokens = dst.tokens[tile], channels = dst.channels[tile];
    const int raw_size = 4 + pad4(tokens * channels * KVF_ITEM);
    if (size < 4) return false;
    if (in[0] == 0) {
        if (size != raw_size) return false;
        const word_t *values = (const word_t *)(in + 4);
        for (int i = lane; i < tokens * channels; i += 32) value_at(dst, tile, channels, i) = values[i];
        return true;
    }
    const int lanes = (channels + CPL - 1) / CPL;
    const int planes_at = 16 + 4 * lanes;
    const int steps_at = planes_at + pad4(PLANES * tokens * channels);
    const int classes_at = steps_at + (CHANNEL_STEPS ? pad4(2 * channels) : 0);
    if (in[0] != 1 || size < classes_at || size >= raw_size) return false;
    const u32 *header = (const u32 *)in;
    const int base_code = header[0] >> 8 & 255, class_code = header[0] >> 16 & 255, least_class = header[0] >> 24;
    const int num_words = header[1] & 0xffff, num_exact = header[1] >> 16;
    if (base_code > 4 || class_code > 2) return false;
    const int bases_at = classes_at + pad4((channels * small_bits(class_code) + 7) / 8);
    if (size < bases_at) return false;

    const Rows<CPL> rows(dst, tile, lane, channels);
    int table[CPL], shift[CPL], base[CPL], my_bases = 0, my_words = 0;
    bool has_base[CPL], good = true;
    float step[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        const int c = lane * CPL + k;
        const bool exists = k < rows.count;
        int klass = exists ? (int)get_small(in + classes_at, c, class_code) + least_class : 0;
        has_base[k] = exists && KVF_BASES == ALL;
        if (KVF_BASES == APART) {
            has_base[k] = exists && (klass & 1);
            klass >>= 1;
        }
        good &= klass <= (KVF_BOUNDED ? MAX_CLASS : LAST_ONE_SIDED);
        table_and_shift(good ? klass : 0, table[k], shift[k]);
        if (!exists) {
            table[k] = IDLE_TABLE;
            shift[k] = 0;
        }
        my_bases += has_base[k];
        my_words += (tokens * shift[k] + 31) >> 5;
        step[k] = __uint_as_float(header[3]);
        if (CHANNEL_STEPS && exists) step[k] = __uint_as_float((u32)((const u16 *)(in + steps_at))[c] << 16);
    }
    if (!__all_sync(FULL, good)) return false;
    int num_bases, low_words;
    int base_index = exclusive_sum(my_bases, lane, num_bases);
    int low_index = exclusive_sum(my_words, lane, low_words);
    const int low_at = bases_at + pad4((num_bases * small_bits(base_code) + 7) / 8);
    const int words_at = low_at + 4 * low_words;
    const int positions_at = words_at + pad4(2 * num_words), exact_at = positions_at + pad4(2 * num_exact);
    if (size != exact_at + pad4(KVF_ITEM * num_exact)) return false;
    const u32 *low[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        base[k] = has_base[k] ? (int)(get_small(in + bases_at, base_index, base_code) + header[2]) : 0;
        base_index += has_base[k];
        low[k] = (const u32 *)(in + low_at) + low_index;
        low_index += (tokens * shift[k] + 31) >> 5;
    }

    u32 state = lane < lanes ? header[4 + lane] : STATE_LOW;
    bool any_low = false;
#pragma unroll
    for (int k = 0; k < CPL; ++k) any_low |= shift[k] != 0;
    const Stream stream(in, planes_at, words_at, num_words);
    if (LOW_BITS || __any_sync(FULL, any_low))
        good = decode_rows<CPL, true>(rows, stream, tokens, channels, table, shift, base, step, low, state, slots, ring, lane);
    else
        good = decode_rows<CPL, false>(rows, stream, tokens, channels, table, shift, base, step, low, state, slots, ring, lane);
    __syncwarp();
    const u16 *positions = (const u16 *)(in + positions_at);
    const word_t *exact = (const word_t *)(in + exact_at);
    for (int i = lane; i < num_exact; i += 32) {
        if (positions[i] < tokens * channels) value_at(dst, tile, channels, positions[i]) = exact[i];
        else good = false;
    }
    return __all_sync(FULL, good);
}

constexpr int DECODE_WARPS = 16;

// Tiles at `starts` of `payload`, `sizes` bytes each, into `dst`; status[tile] = 1 where the bytes contradict themselves.
extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS, KVF_DECODE_BLOCKS)
    kvf_decode(Source dst, const u8 *payload, const i64 *starts, const int *sizes, const u32 *slots, int *status) {
    extern __shared__ u32 shared_slots[];
    __shared__ u32 ring[DECODE_WARPS][32 * RING_BLOCKS];
    for (int i = threadIdx.x; i < NUM_TABLES * PROB_SCALE / 4; i += blockDim.x) ((uint4 *)shared_slots)[i] = ((const uint4 *)slots)[i];
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int tile = blockIdx.x * DECODE_WARPS + warp; tile < dst.num_tiles; tile += gridDim.x * DECODE_WARPS) {
        const u8 *in = payload + starts[tile];
        bool good = false;
#define KVF_DECODE(CPL)                                                                                                     \
    case CPL:                                                                                                               \
        good = decode_tile<CPL>(dst, tile, in, sizes[tile], shared_slots, ring[warp], lane);                                \
        break
        switch ((dst.channels[tile] + 31) / 32) {
            KVF_DECODE(1);
            KVF_DECODE(2);
            KVF_DECODE(3);
            KVF_DECODE(4);
        }
        __syncwarp();
        if (lane == 0) status[tile] = good ? 0 : 1;
    }
}
