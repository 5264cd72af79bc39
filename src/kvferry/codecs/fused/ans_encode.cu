// Tensor to `ans` tiles in one launch: quantise (or split), choose tables, rANS. Behind ans_choose.cu.

// The raw low bits of a lane's channels, written from the last token to the first.
template <int CPL>
struct LowWriter {
    u32 *words;
    int start[CPL], at[CPL];
    u32 pending[CPL];

    __device__ __forceinline__ LowWriter(u32 *section, int before, int tokens, const int (&width)[CPL]) : words(section) {
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const int count = (tokens * width[k] + 31) >> 5;
            start[k] = before;
            at[k] = before + count - 1;
            pending[k] = 0;
            before += count;
        }
    }
    __device__ __forceinline__ void put(int k, int t, int width, u32 value) {
        const int bit = t * width, word = start[k] + (bit >> 5);
        const u64 spread = (u64)value << (bit & 31);
        if (word < at[k]) {
            words[at[k]] = pending[k] | (u32)(spread >> 32);
            at[k] = word;
            pending[k] = 0;
        }
        pending[k] |= (u32)spread;
    }
    __device__ __forceinline__ void finish(const int (&width)[CPL]) {
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            if (width[k]) words[start[k]] = pending[k];
    }
};

// Words and positions gather behind the tile until their number is known, from the end of the row downwards.
struct Gathered {
    u16 *words_end, *positions_end;
    int num_words, num_exact;
};

// Code a tile, last token first. LOW: some channel has raw low bits.
template <int CPL, bool LOW>
__device__ __forceinline__ void code_rows(const Rows<CPL> &rows, int tokens, int channels, const Quantiser (&quantiser)[CPL],
                                          const Choice<CPL> &choice, const int (&table)[CPL], const int (&shift)[CPL],
                                          const uint2 *tables, u8 *planes, u32 *low_section, int low_before, u32 *states,
                                          Gathered &gathered, int lane) {
    constexpr int MIDDLE = KVF_BOUNDED ? ALPHABET / 2 : 0;  // entry of symbol 0
    const u32 below = lanes_before(), mine = (1u << rows.count) - 1;
    LowWriter<CPL> low(low_section, low_before, tokens, shift);
    const u32 tables_address = shared_address(tables);
    u32 entries[CPL];
    int offset[CPL];  // what takes a code to its entry
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        entries[k] = tables_address + table[k] * ALPHABET * 8;
        const int half = LOW && KVF_BOUNDED ? (1 << shift[k]) >> 1 : 0;
        offset[k] = half - (DELTA ? 0 : choice.base[k] * (1 << LOW_BITS));
    }
    u32 state = STATE_LOW;
    int num_words = 0, num_exact = 0;
    int code[CPL];  // differences only: the codes of the row at hand, and which of its values are stored exactly
    u32 exact_mask = 0;
    // Differences need the row before the one at hand, so their loads run one row further ahead.
    constexpr int LEAD = DELTA ? 1 : 0;
    u32 row[Rows<CPL>::PACKED] = {}, fetched[Rows<CPL>::PACKED] = {};
    if (tokens - 1 - LEAD >= 0) rows.load(tokens - 1 - LEAD, row);
    if constexpr (DELTA) {
        rows.load(tokens - 1, fetched);
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            bool exact;
            code[k] = quantise(Rows<CPL>::value(fetched, k), quantiser[k], exact);
            exact_mask |= (u32)exact << k;
        }
    }
    for (int t = tokens - 1; t >= 0; --t) {
        int value[CPL];
        u32 missing = exact_mask;
        if (t - 1 - LEAD >= 0) rows.load(t - 1 - LEAD, fetched);
        exact_mask = 0;
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const u32 word = Rows<CPL>::value(row, k);
            bool exact = false;
            if constexpr (!KVF_BOUNDED) {
                u32 rest;
                value[k] = split(word, rest);
#pragma unroll
                for (int p = 0; p < PLANES; ++p)
                    if (k < rows.count) planes[(p * tokens + t) * channels + lane * CPL + k] = (u8)(rest >> (8 * p));
            } else if constexpr (!DELTA) {
                value[k] = quantise(word, quantiser[k], exact);
                missing |= (u32)exact << k;
            } else {
                const int before = t > 0 ? quantise(word, quantiser[k], exact) : choice.base[k];
                value[k] = code[k] - before;
                code[k] = before;
                exact_mask |= (u32)exact << k;
            }
        }
#pragma unroll
        for (int k = CPL - 1; k >= 0; --k) {
            int column = value[k] + offset[k];
            if (LOW) {
                if (shift[k]) low.put(k, t, shift[k], column & ((1 << shift[k]) - 1));
                column >>= shift[k];
            }
            // The first and the last entry of a table are empty: what lies outside it finds nothing there.
            uint2 entry = load_shared_pair(entries[k] + 8 * min(max(column + MIDDLE, 0), ALPHABET - 1));
            if (entry.y == 0) {
                missing |= 1u << k;
                entry = load_shared_pair(entries[k] + 8 * MIDDLE);
            }
            // entry: x = reciprocal; y = frequency (11 bits), bias (11), shift of the reciprocal (4)
            const u32 frequency = entry.y & 2047, bias = entry.y >> 11 & 2047;
            const bool full = state >> (32 - PROB_BITS) >= frequency;
            const u32 mask = __ballot_sync(FULL, full);
            num_words += __popc(mask);
            if (full) {
                gathered.words_end[__popc(mask & below) - num_words] = (u16)state;
                state >>= 16;
            }
            const u32 quotient = __umulhi(state, entry.x) >> (entry.y >> 22);
            state += bias + quotient * (PROB_SCALE - frequency);
        }
        missing &= mine;
        if (__any_sync(FULL, missing)) {
            int total, at = exclusive_sum(__popc(missing), lane, total);
            num_exact += total;
#pragma unroll
            for (int k = 0; k < CPL; ++k)
                if (missing >> k & 1) gathered.positions_end[at++ - num_exact] = (u16)(t * channels + lane * CPL + k);
        }
#pragma unroll
        for (int i = 0; i < Rows<CPL>::PACKED; ++i) row[i] = fetched[i];
    }
    if (LOW) low.finish(shift);
    if (lane < (channels + CPL - 1) / CPL) states[lane] = state;
    gathered.num_words = num_words;
    gathered.num_exact = num_exact;
}

template <int CPL>
__device__ int encode_tile(const Source &src, int tile, const Quantiser *quantisers, const uint2 *tables, const int *radius, u8 *row,
                           int row_bytes, u32 *staged, int lane) {
    const int tokens = src.tokens[tile], channels = src.channels[tile];
    const int raw_size = 4 + pad4(tokens * channels * KVF_ITEM);
    const Rows<CPL> rows(src, tile, lane, channels);
    Quantiser quantiser[CPL] = {};
    if (KVF_BOUNDED) {
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            quantiser[k] = CHANNEL_STEPS ? quantisers[(i64)tile * 128 + min(lane * CPL + k, 127)] : k ? quantiser[0] : quantisers[tile];
    }
    const Choice<CPL> choice = choose(rows, tokens, quantiser, radius);

    // Where the sections lie.
    const int lanes = (channels + CPL - 1) / CPL;
    int least_class = 255, most_class = 0, least_base = 0x7fffffff, most_base = -0x7fffffff - 1, my_bases = 0, my_words = 0;
    int table[CPL], shift[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        table_and_shift(choice.klass[k], table[k], shift[k]);
        if (k >= rows.count) {
            table[k] = IDLE_TABLE;
            shift[k] = 0;
            continue;
        }
        least_class = min(least_class, choice.stored(k));
        most_class = max(most_class, choice.stored(k));
        if (choice.has_base(k)) {
            ++my_bases;
            least_base = min(least_base, choice.base[k]);
            most_base = max(most_base, choice.base[k]);
        }
        my_words += (tokens * shift[k] + 31) >> 5;
    }
    least_class = warp_min(least_class);
    least_base = warp_min(least_base);
    most_base = warp_max(most_base);
    int num_bases, low_words;
    const int bases_before = exclusive_sum(my_bases, lane, num_bases), low_before = exclusive_sum(my_words, lane, low_words);
    if (num_bases == 0) least_base = most_base = 0;
    const int class_code = small_code(warp_max(most_class) - least_class), base_code = small_code((u32)most_base - (u32)least_base);
    const int planes_at = 16 + 4 * lanes;
    const int steps_at = planes_at + pad4(PLANES * tokens * channels);
    const int classes_at = steps_at + (CHANNEL_STEPS ? pad4(2 * channels) : 0);
    const int bases_at = classes_at + pad4((channels * small_bits(class_code) + 7) / 8);
    const int low_at = bases_at + pad4((num_bases * small_bits(base_code) + 7) / 8);
    const int words_at = low_at + 4 * low_words;
    if (words_at >= raw_size) return put_raw(src, tile, tokens, channels, row, lane);

    // Everything that does not depend on the coder.
#pragma unroll
    for (int k = 0; k < CPL; ++k)
        if (k < rows.count) staged[lane * CPL + k] = choice.stored(k) - least_class;
    __syncwarp();
    put_small(row + classes_at, staged, channels, class_code, lane);
    __syncwarp();
    int base_index = bases_before;
#pragma unroll
    for (int k = 0; k < CPL; ++k)
        if (k < rows.count && choice.has_base(k)) staged[base_index++] = (u32)choice.base[k] - (u32)least_base;
    __syncwarp();
    put_small(row + bases_at, staged, num_bases, base_code, lane);
    __syncwarp();
    if (CHANNEL_STEPS) {
        u16 *steps = (u16 *)(row + steps_at);
        for (int c = lane; c < pad4(2 * channels) / 2; c += 32)
            steps[c] = c < channels ? (u16)(__float_as_uint(quantisers[(i64)tile * 128 + c].step) >> 16) : (u16)0;
    }
    if (PLANES && lane < pad4(PLANES * tokens * channels) - PLANES * tokens * channels)
        row[planes_at + PLANES * tokens * channels + lane] = 0;

    Gathered gathered;
    gathered.words_end = (u16 *)(row + row_bytes);
    gathered.positions_end = gathered.words_end - tokens * channels;
    u32 *low_section = (u32 *)(row + low_at), *states = (u32 *)(row + 16);
    if (LOW_BITS || low_words)
        code_rows<CPL, true>(rows, tokens, channels, quantiser, choice, table, shift, tables, row + planes_at, low_section, low_before,
                             states, gathered, lane);
    else
        code_rows<CPL, false>(rows, tokens, channels, quantiser, choice, table, shift, tables, row + planes_at, low_section, low_before,
                              states, gathered, lane);

    // What the coder made, to its place.
    const int num_words = gathered.num_words, num_exact = gathered.num_exact;
    const int positions_at = words_at + pad4(2 * num_words), exact_at = positions_at + pad4(2 * num_exact);
    const int size = exact_at + pad4(KVF_ITEM * num_exact);
    if (size >= raw_size) return put_raw(src, tile, tokens, channels, row, lane);
    __syncwarp();
    const u16 *words = gathered.words_end - num_words, *positions = gathered.positions_end - num_exact;
    u32 *out_words = (u32 *)(row + words_at);
#pragma unroll 4
    for (int i = lane; i < (num_words + 1) / 2; i += 32)
        out_words[i] = words[2 * i] | (2 * i + 1 < num_words ? (u32)words[2 * i + 1] << 16 : 0u);
    u16 *out_positions = (u16 *)(row + positions_at);
    word_t *out_exact = (word_t *)(row + exact_at);
    for (int i = lane; i < pad4(2 * num_exact) / 2; i += 32) out_positions[i] = i < num_exact ? positions[i] : (u16)0;
    for (int i = lane; i < pad4(KVF_ITEM * num_exact) / KVF_ITEM; i += 32)
        out_exact[i] = i < num_exact ? value_at(src, tile, channels, positions[i]) : (word_t)0;
    if (lane == 0) {
        u32 *header = (u32 *)row;
        header[0] = 1u | (u32)base_code << 8 | (u32)class_code << 16 | (u32)least_class << 24;
        header[1] = (u32)num_words | (u32)num_exact << 16;
        header[2] = (u32)least_base;
        header[3] = KVF_BOUNDED && !CHANNEL_STEPS ? __float_as_uint(quantiser[0].step) : 0u;
    }
    return size;
}

constexpr int ENCODE_WARPS = 8;

// Rows of `row_bytes` at `scratch` (room for the raw tile and, behind it, 4 bytes a value), and the size of each tile.
extern "C" __global__ void __launch_bounds__(32 * ENCODE_WARPS, KVF_ENCODE_BLOCKS)
    kvf_encode(Source src, const Quantiser *quantisers, const uint2 *tables, const int *radius, u8 *scratch, i64 row_bytes, int *sizes) {
    __shared__ uint2 shared_tables[NUM_TABLES * ALPHABET];
    __shared__ u32 staged[ENCODE_WARPS][128];
    for (int i = threadIdx.x; i < NUM_TABLES * ALPHABET; i += blockDim.x) shared_tables[i] = tables[i];
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int tile = blockIdx.x * ENCODE_WARPS + warp; tile < src.num_tiles; tile += gridDim.x * ENCODE_WARPS) {
        u8 *row = scratch + tile * row_bytes;
        int size = 0;
#define KVF_ENCODE(CPL)                                                                                                     \
    case CPL:                                                                                                               \
        size = encode_tile<CPL>(src, tile, quantisers, shared_tables, radius, row, (int)row_bytes, staged[warp], lane);     \
        break
        switch ((src.channels[tile] + 31) / 32) {
            KVF_ENCODE(1);
            KVF_ENCODE(2);
            KVF_ENCODE(3);
            KVF_ENCODE(4);
        }
        __syncwarp();
        if (lane == 0) sizes[tile] = size;
    }
}
