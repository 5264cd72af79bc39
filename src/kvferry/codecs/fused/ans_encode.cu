// rANS over a tile's symbols, last pair of steps first. Behind writer.cu.
//
// A pair emits at most one word a lane, 2 bytes for two values: the words never outgrow the bytes already coded, and lie where
// those lay, from the end of the stage downwards.

struct Coded {
    u32 state;
    int num_words;
    bool any_exact;
};

// Entries are {reciprocal, shift of the reciprocal | 256 - frequency << 8 | bias << 16}; both 0 where a table has no symbol. The shift needs no
// instruction to take it out, since shifts by a word look at its lowest 5 bits, and the bias is added as it is taken out: by a product, since
// the pipe that shifts has more to do than the one that multiplies.
__device__ __forceinline__ u32 complement_of(uint2 entry) { return __byte_perm(entry.y, 0, 0x4441); }
__device__ __forceinline__ void code_symbol(u32 &state, uint2 entry, u32 complement) {
    const u32 quotient = __funnelshift_r(__umulhi(state, entry.x), 0, entry.y);
    state = quotient * complement + dot2(entry.y, 0x0100, state);
}

constexpr int MIDDLE = BOUNDED ? ALPHABET / 2 : 0;  // entry of symbol 0

// From a value of a lane's channels to its entry: (value + offset) >> shift; a channel's first one has its own offset in differences.
template <int CPL>
struct Columns {
    int offset[CPL], first_offset[CPL], shift[CPL];
};

// Low bits of a lane's channels on their way to `out`, four tokens' at a time, each channel's stream from word `index` on behind the last one's;
// nowhere, if that is null.
template <int CPL>
struct LowStreams {
    Writer writer;
    int at[CPL], filled[CPL], width[CPL];
    u32 pending[CPL];

    __device__ __forceinline__ LowStreams(const Columns<CPL> &columns, int tokens, int count, u8 *out, int index) : writer{out, 0} {
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            pending[k] = filled[k] = 0;
            width[k] = out && k < count ? columns.shift[k] : 0;
            at[k] = index;
            index += stream_words(tokens, width[k]);
        }
    }
    // Those of the next four tokens, of `tokens` that are left: what is there beyond these is dropped.
    __device__ __forceinline__ void put(int k, u32 four, int tokens) {
        const int bits = min(4, tokens) * width[k];
        if (tokens < 4) four &= (1u << bits) - 1;
        const u64 joined = (u64)four << filled[k];
        pending[k] |= (u32)joined;
        filled[k] += bits;
        if (filled[k] >= 32) {
            writer.word(at[k]++, pending[k]);
            pending[k] = (u32)(joined >> 32);
            filled[k] -= 32;
        }
    }
    // Their share of the checksum.
    __device__ __forceinline__ u64 end() {
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            if (filled[k]) writer.word(at[k], pending[k]);
        return writer.sum;
    }
};

// The slow way: the entries' numbers in place of the bytes.
template <int CPL>
__device__ __noinline__ bool stage_columns(int tile_index, const Quantisers<CPL> quantisers, const Columns<CPL> columns, const Stage stage, int lane) {
    const Source &s = the_source;
    const Tile tile(s, tile_index);
    const Rows<CPL> rows(s, tile, lane);
    const int tokens = tile.tokens, channels = tile.channels;
    int previous[CPL];
    bool any_exact = false;
#pragma unroll 1
    for (int t = 0; t < tokens; ++t) {
        int code[CPL];
        u32 exact;
        slow_codes<CPL>(rows, t, quantisers.each, code, exact);
        any_exact |= exact != 0;
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            int value = code[k];
            if (DELTA && t) value -= previous[k];
            previous[k] = code[k];
            const int column = (value + (t ? columns.offset[k] : columns.first_offset[k])) >> columns.shift[k];
            store_shared_u8(stage.codes + ((t / 4 * 32 + lane) * CPL + k) * 4 + t % 4, (u32)max(min(column, ALPHABET - 1), 0));
            if (exact >> k & 1) mark_exact(stage, t * channels + lane * CPL + k);
        }
    }
    __syncwarp();
    return any_exact;
}

// The same from the bytes, where values have low bits: what lies above those takes the bytes' place, so that the loop over symbols is spared
// shifts. The low bits go to `out`, if that is not null, the lane's from word `index` on; returned is their share of the checksum.
template <int CPL>
__device__ __noinline__ u64 split_columns(int tokens, int count, const Columns<CPL> columns, const Stage stage, u8 *out, int index, int lane) {
    LowStreams<CPL> low_streams(columns, tokens, count, out, index);
    int previous[CPL] = {};
#pragma unroll 1
    for (int t = 0; t < tokens; t += 4) {
        const u32 address = stage.codes + (t / 4 * 32 + lane) * CPL * 4;
        u32 packed[CPL];
        load_shared_words<CPL>(address, packed);
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            u32 column[4], low = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int byte = __byte_perm(packed[k], 0, 0x4440 + i);
                const int value = byte - previous[k] + (t || i ? columns.offset[k] : columns.first_offset[k]);
                if (DELTA) previous[k] = byte;
                column[i] = (u32)clamp_to(value >> columns.shift[k], ALPHABET - 1);
                low |= ((u32)value & ((1u << low_streams.width[k]) - 1)) << (i * low_streams.width[k]);
            }
            if (BOUNDED) packed[k] = __byte_perm(__byte_perm(column[0], column[1], 0x0040), __byte_perm(column[2], column[3], 0x0040), 0x5410);
            low_streams.put(k, low, tokens - t);
        }
        if (BOUNDED) store_shared_words<CPL>(address, packed);
    }
    const u64 sum = low_streams.end();
    __syncwarp();
    return sum;
}

// The same of tiles without differences, two values to an instruction: of at most PAIR_BITS low bits, so that four values' fit a word.
constexpr int PAIR_BITS = 8;
template <int CPL>
__device__ __noinline__ u64 split_pairs(int tokens, int count, const Columns<CPL> columns, const Stage stage, u8 *out, int index, int lane) {
    LowStreams<CPL> low_streams(columns, tokens, count, out, index);
    u32 offset[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) offset[k] = ((u32)columns.offset[k] & 0xffff) * 0x10001;
#pragma unroll 1
    for (int t = 0; t < tokens; t += 4) {
        const u32 address = stage.codes + (t / 4 * 32 + lane) * CPL * 4;
        u32 packed[CPL];
        load_shared_words<CPL>(address, packed);
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const int width = columns.shift[k];
            const u32 mask = ((1u << width) - 1) * 0x10001, most = ((ALPHABET << width) - 1) * 0x10001;
            // Of tokens 0 and 2, and of 1 and 3.
            const u32 even = __byte_perm(packed[k], 0, 0x4240), odd = __byte_perm(packed[k], 0, 0x4341);
            const u32 even_column = clamp_halves(even, offset[k], most) >> width & (ALPHABET - 1) * 0x10001;
            const u32 odd_column = clamp_halves(odd, offset[k], most) >> width & (ALPHABET - 1) * 0x10001;
            packed[k] = __byte_perm(even_column, odd_column, 0x6240);
            const u32 least = offset[k] & mask;  // no sum of it and a byte leaves its half
            const u32 low = (even + least & mask) | (odd + least & mask) << width;
            low_streams.put(k, (low & 0xffff) | low >> 16 << (2 * width), tokens - t);
        }
        store_shared_words<CPL>(address, packed);
    }
    const u64 sum = low_streams.end();
    __syncwarp();
    return sum;
}

// The same where few channels have low bits (FEW at most, of at most 16 bits): these alone, one after another, each by the whole warp, a lane
// for two tokens. The bytes of others stay. No differences.
constexpr int FEW = 24, FEW_BITS = 16;
template <int CPL>
__device__ __noinline__ u64 split_few_columns(int tokens, const Columns<CPL> columns, const Stage stage, u8 *out, int index, int lane) {
    Writer writer = {out, 0};
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        const int own = columns.shift[k];
        for (u32 left = __ballot_sync(FULL, own != 0); left; left &= left - 1) {
            const int of = __ffs(left) - 1, width = __shfl_sync(FULL, own, of), offset = __shfl_sync(FULL, columns.offset[k], of);
            const int at = __shfl_sync(FULL, index, of), bit = 2 * lane * width, words = stream_words(tokens, width);
            const u32 address = stage.codes + ((lane / 2 * 32 + of) * CPL + k) * 4 + lane % 2 * 2, two = load_shared_u16(address);
            const int first = (int)(two & 255) + offset, second = (int)(two >> 8) + offset;
            store_shared_u16(address, (u32)clamp_to(first >> width, ALPHABET - 1) | (u32)clamp_to(second >> width, ALPHABET - 1) << 8);
            const u32 mask = (1u << width) - 1;
            u32 low = 0;
            if (2 * lane < tokens) low = (u32)first & mask;
            if (2 * lane + 1 < tokens) low |= ((u32)second & mask) << width;
            const u64 joined = (u64)low << (bit & 31);
            u32 word = 0;
#pragma unroll 2
            for (int i = 0; i < words; ++i) {
                const u32 part = bit >> 5 == i ? (u32)joined : (bit >> 5) + 1 == i ? (u32)(joined >> 32) : 0, all = __reduce_or_sync(FULL, part);
                if (lane == i) word = all;
            }
            if (out && lane < words) writer.word(at + lane, word);
        }
        index += stream_words(tokens, own);
    }
    __syncwarp();
    return writer.sum;
}

// The columns of codes that bytes do not reach, once all bytes are columns. (Bytes have the low bits of such codes right.)
template <int CPL>
__device__ __noinline__ void stage_wide(int tile_index, const Quantisers<CPL> quantisers, const Columns<CPL> columns, const Stage stage, int lane) {
    each_wide_code<CPL>(tile_index, quantisers, stage, lane, [&](int t, int k, u32 code) {
        const int byte = (int)code - WIDE_BELOW;
        if ((u32)byte < 256) return;
        store_shared_u8(stage.codes + ((t / 4 * 32 + lane) * CPL + k) * 4 + t % 4, (u32)clamp_to((byte + columns.offset[k]) >> columns.shift[k], ALPHABET - 1));
    });
    __syncwarp();
}

template <int CPL>
__device__ __forceinline__ Coded encode_ans(int tile_index, int count, int tokens, int channels, const Quantisers<CPL> &quantisers,
                                            const Choice<CPL> &choice, const Gathered &gathered, const Stage &stage, u32 tables, u8 *low_out,
                                            int low_index, int lane) {
    const u32 behind = lanes_behind(), idle = tables + (IDLE_TABLE * ALPHABET + MIDDLE) * 8;
    const int groups = (tokens + 3) / 4;
    u32 entries[CPL];
    Columns<CPL> columns;
    int most_shift = 0;
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        int table;
        table_and_shift(choice.klass[0][k], table, columns.shift[k]);
        if (k >= count) {
            table = IDLE_TABLE;
            columns.shift[k] = LOW_BITS;
        }
        most_shift = max(most_shift, columns.shift[k]);
        entries[k] = tables + table * ALPHABET * 8;
        if constexpr (LOSSLESS) {
            columns.offset[k] = columns.first_offset[k] = -((int)EXPONENT_MASK + choice.base[0][k]) * (1 << LOW_BITS);
        } else {
            const int rounded = ((1 << columns.shift[k]) >> 1) + (MIDDLE << columns.shift[k]), from = gathered.fast ? stage.origin(lane * CPL + k) : 0;
            columns.first_offset[k] = rounded - choice.base[0][k] + from;
            columns.offset[k] = DELTA ? rounded : columns.first_offset[k];
        }
    }
    Coded coded = {STATE_LOW, 0, gathered.any_exact};
    u32 before = FULL;  // differences: mask of the byte that is taken off
    const bool low = BOUNDED && (__any_sync(FULL, most_shift) || (CENTRED && gathered.wide));  // whether bytes are made columns first
    // Two columns at once where nothing is to be shifted off: bytes and their offsets, which lie within some hundreds of 0, fit halves.
    constexpr bool PAIRED = !DELTA && LOW_BITS == 0;
    u64 low_sum = 0;
    bool few = false, pairs = false;
    if (BOUNDED ? gathered.fast && low : LOW_BITS && low_out) {
        if (PAIRED) {
            int split = 0;
#pragma unroll
            for (int k = 0; k < CPL; ++k) split += __popc(__ballot_sync(FULL, columns.shift[k] != 0));
            few = split <= FEW && __all_sync(FULL, most_shift <= FEW_BITS) && !gathered.wide;
            pairs = __all_sync(FULL, most_shift <= PAIR_BITS);
        }
        low_sum = few     ? split_few_columns<CPL>(tokens, columns, stage, low_out, low_index, lane)
                  : pairs ? split_pairs<CPL>(tokens, count, columns, stage, low_out, low_index, lane)
                          : split_columns<CPL>(tokens, count, columns, stage, low_out, low_index, lane);
        if (CENTRED && gathered.wide) stage_wide<CPL>(tile_index, quantisers, columns, stage, lane);
    }
    if (low_out) {  // in memory: registers are dear in the loop below
        store_shared(stage.small_at(LOW_SUM_AT + 2 * lane), (u32)low_sum);
        store_shared(stage.small_at(LOW_SUM_AT + 2 * lane + 1), (u32)(low_sum >> 32));
    }
    if (BOUNDED && (low || !gathered.fast)) {
        if (!gathered.fast) coded.any_exact |= stage_columns<CPL>(tile_index, quantisers, columns, stage, lane);
        before = 0;
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            if (!few || columns.shift[k]) columns.offset[k] = columns.first_offset[k] = 0;
    }
    u32 pair_offset[CPL];
#pragma unroll
    for (int k = 0; k < CPL; ++k) pair_offset[k] = ((u32)columns.offset[k] & 0xffff) * 0x10001;
    u32 state = STATE_LOW, words_at = stage.codes + groups * 128 * CPL;  // address of the last word written
    u32 next[CPL] = {};
    const u32 codes = stage.codes + lane * CPL * 4;
    load_shared_words<CPL>(codes + (groups - 1) * 128 * CPL, next);
#pragma unroll 1
    for (int g = groups - 1; g >= 0; --g) {
        u32 packed[CPL], address[4][CPL];
#pragma unroll
        for (int k = 0; k < CPL; ++k) packed[k] = next[k];
        if (g > 0) load_shared_words<CPL>(codes + (g - 1) * 128 * CPL, next);
        __syncwarp();  // every lane has its bytes before words take their place
        if constexpr (PAIRED) {
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                // Of tokens 0 and 2, and of 1 and 3. The first and the last entry of a table are empty: what lies outside it finds nothing there.
                const u32 even = clamp_halves(__byte_perm(packed[k], 0, 0x4240), pair_offset[k], (ALPHABET - 1) * 0x10001);
                const u32 odd = clamp_halves(__byte_perm(packed[k], 0, 0x4341), pair_offset[k], (ALPHABET - 1) * 0x10001);
                address[0][k] = dot2(even, 0x0008, entries[k]);
                address[1][k] = dot2(odd, 0x0008, entries[k]);
                address[2][k] = dot2(even, 0x0800, entries[k]);
                address[3][k] = dot2(odd, 0x0800, entries[k]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int k = 0; k < CPL; ++k) {
                    int column = __byte_perm(packed[k], 0, 0x4440 + i);
                    if constexpr (DELTA) {
                        if (i) column -= (int)(__byte_perm(packed[k], 0, 0x4440 + (i ? i - 1 : 0)) & before);
                        else if (g) column -= (int)(__byte_perm(next[k], 0, 0x4443) & before);
                    }
                    column += DELTA && i == 0 && g == 0 ? columns.first_offset[k] : columns.offset[k];
                    if (LOW_BITS) column >>= LOW_BITS;
                    address[i][k] = entries[k] + 8 * clamp_to(column, ALPHABET - 1);
                }
        }
        if (4 * g + 4 > tokens) {
#pragma unroll
            for (int i = 1; i < 4; ++i)
                if (4 * g + i >= tokens)
#pragma unroll
                    for (int k = 0; k < CPL; ++k) address[i][k] = idle;
        }
        // All entries first: their latencies overlap, and the loop over pairs has no branch. A reciprocal has its top bit set.
        uint2 entry[4][CPL];
        u32 all = FULL;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                entry[i][k] = table_words(address[i][k]);
                all &= entry[i][k].x;
            }
        if ((int)all >= 0) {
            coded.any_exact = true;
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int k = 0; k < CPL; ++k)
                    if (entry[i][k].x == 0) {
                        mark_exact(stage, (4 * g + i) * channels + lane * CPL + k);
                        entry[i][k] = table_words(entries[k] + 8 * MIDDLE);
                    }
        }
#pragma unroll
        for (int pair = 2 * CPL - 1; pair >= 0; --pair) {
            const uint2 low_step = entry[2 * pair / CPL][2 * pair % CPL], high_step = entry[(2 * pair + 1) / CPL][(2 * pair + 1) % CPL];
            const u32 low_complement = complement_of(low_step), high_complement = complement_of(high_step);
            // What the state must not exceed for its product with both frequencies to fit 32 bits: that product of theirs above 16 bits.
            emit_word(state, words_at, (PROB_SCALE - low_complement) * (PROB_SCALE * 65536 - high_complement * 65536) - 1, behind);
            code_symbol(state, high_step, high_complement);
            code_symbol(state, low_step, low_complement);
        }
    }
    __syncwarp();
    coded.state = state;
    coded.num_words = (int)(stage.codes + groups * 128 * CPL - words_at) / 2;
    coded.any_exact = __any_sync(FULL, coded.any_exact);
    return coded;
}
