// From a tile's sections to its values, four tokens at a time. Behind read.cu.

// Everything about a tile's groups that decoding needs.
template <int CPL>
struct Groups {
    int klass[NUM_BLOCKS][CPL], base[NUM_BLOCKS][CPL], low[NUM_BLOCKS][CPL];  // low: first word of the stream
    float step[CPL];
    u32 apart;

    __device__ __forceinline__ int width(int b, int k) const {
        if constexpr (!ANS) return klass[b][k];
        int table, shift;
        table_and_shift(klass[b][k], table, shift);
        return shift;
    }
};

struct Sections {
    int planes_at, low_at, low_words, words_at, num_words, positions_at, exact_at, num_exact;
};

// `width` bits of a dense stream, which begins with word `first`, from bit `bit` on; a stream's last word is read only where it is needed.
__device__ __forceinline__ u32 stream_bits(const u32 *low, int first, int bit, int width) {
    const int word = first + (bit >> 5), from = bit & 31;
    u32 high = 0;
    if (from + width > 32) high = low[word + 1];
    const u32 bits = __funnelshift_r(low[word], high, from);
    return width == 32 ? bits : bits & ((1u << width) - 1);
}
// The same of four tokens, where they are not in shared memory or take more than a word: rare.
__device__ __noinline__ uint4 stream_bits_of_four(const u32 *low, int first, int t0, int tokens, int width) {
    u32 bits[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (t0 + i < tokens) bits[i] = stream_bits(low, first, (t0 + i) * width, width);
    return {bits[0], bits[1], bits[2], bits[3]};
}

// Added to bases, so that a code is a float's bits as it is summed up (see `whole`).
constexpr int WHOLE = BOUNDED && !DELTA ? ROUNDER_BITS : 0;

// The tokens of a tile, in order, four at a time. Returns whether the lane ended as it must. `has_low` (ans): some channel has raw low bits.
// STAGED (bitpack): the groups lie in shared memory. ans: words do, at `stage` and in `window` words, and low bits at `low_stage`, if that is not 0.
template <int CPL, bool STAGED>
__device__ __forceinline__ bool decode_rows(const Rows<CPL> &rows, const Tile &tile, const u8 *in, const Sections &at, const Groups<CPL> &groups,
                                            u32 state, bool has_low, u32 tables, u32 low_stage, u32 stage, int window, int lane) {
    constexpr int PACKED = Rows<CPL>::PACKED;
    const u32 below = lanes_before();
    const int tokens = tile.tokens, channels = tile.channels;
    const u32 *low = (const u32 *)(in + at.low_at);
    u32 words = stage;  // address of the next rANS word
    int passed = 0;     // words before the window
    // Beyond this the window must move on: four tokens take at most 2 * CPL * 32 words.
    const auto limit_of = [&] { return at.num_words - passed > 2 * window ? stage + 4 * window - 4 * CPL * 32 : FULL; };
    u32 limit = limit_of();
    u8 *row = nullptr;
    int code[CPL], add[CPL];
    u32 widths = 0;  // of the lane's low bits, a byte a channel; their streams follow one another
    const int first_low = groups.low[0][0];
    u32 slots[CPL];
    const u32 idle = tables + IDLE_TABLE * PROB_SCALE * 4;
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        int table, shift;
        table_and_shift(groups.klass[0][k], table, shift);
        if (k >= rows.count) {
            table = IDLE_TABLE;
            shift = 0;
        }
        widths |= (u32)shift << (8 * k);
        slots[k] = tables + table * PROB_SCALE * 4;
        code[k] = 0;
        add[k] = groups.base[0][k] + WHOLE;
        if (ANS && BOUNDED && !DELTA) add[k] -= (1 << shift) >> 1;  // for the low bits, whose zero lies in the middle
    }
    // Bytes of planes run a group of four tokens ahead.
    const bool plane_words = CPL == 4 && channels % 4 == 0;
    u32 planes[PLANES + 1][4];
    const auto load_planes = [&](int t0) {
#pragma unroll
        for (int p = 0; p < PLANES; ++p)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                planes[p][i] = 0;
                if (t0 + i >= tokens) continue;
                const u8 *bytes = in + at.planes_at + (p * tokens + t0 + i) * channels + lane * CPL;
                if (plane_words) {
                    if (rows.count) planes[p][i] = *(const u32 *)bytes;
                } else {
#pragma unroll
                    for (int k = 0; k < CPL; ++k)
                        if (k < rows.count) planes[p][i] |= (u32)bytes[k] << (8 * k);
                }
            }
    };
    load_planes(0);
#pragma unroll 1
    for (int t0 = 0; t0 < tokens; t0 += 4) {
        int value[4][CPL];  // before low bits: the symbol in the top byte
        const auto take_symbols = [&] {
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int k = 0; k < CPL; ++k) value[i][k] >>= 24;
        };
        const auto add_up = [&](auto above) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int k = 0; k < CPL; ++k) {
                    code[k] = above(value[i][k], add[k] + (DELTA ? code[k] : 0));
                    if (DELTA) add[k] = 0;  // the base was the first difference's
                    value[i][k] = code[k];
                }
        };
        const auto whole_sum = [](int v, int more) { return v + more; };
        if constexpr (ANS) {
            if (words > limit) {
                passed += (int)(words - stage) / 2 & ~1;
                const u32 offset = (words - stage) & 2;
                const u32 *more = (const u32 *)(in + at.words_at) + passed / 2;
                const int count = min(window, (at.num_words - passed + 1) / 2);
                __syncwarp();
                for (int i = lane; i < count; i += 32) store_shared(stage + 4 * i, more[i]);
                __syncwarp();
                words = stage + offset;
                limit = limit_of();
            }
            const auto decode_symbols = [&](bool tail) {
#pragma unroll
                for (int pair = 0; pair < 2 * CPL; ++pair) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int step = 2 * pair + half, i = step / CPL, k = step % CPL;
                        // {frequency (16 bits), slot - cum (8), symbol (8, signed)}, at four times the state's low byte: one instruction, as a product.
                        const u32 slot = table_word(dot4(state, 4, tail && i && t0 + i >= tokens ? idle : slots[k]));
                        state = (slot & 0xffff) * (state >> PROB_BITS) + __byte_perm(slot, 0, 0x4442);
                        value[i][k] = (int)slot;
                    }
                    take_word(state, words, below);
                }
            };
            // Behind the last token nothing is coded. Twice the code: choosing in every step costs more, and the other is hardly ever there.
            if (t0 + 4 > tokens) decode_symbols(true);
            else decode_symbols(false);
            if constexpr (LOW_BITS > 0) {
                take_symbols();
                int first = first_low;
#pragma unroll
                for (int k = 0; k < CPL; ++k, first += stream_words(tokens, LOW_BITS)) {
                    const int width = (int)(widths >> (8 * k) & 255);  // LOW_BITS, or 0 of a channel that is not there; four times that fit a word
                    if (width == 0) continue;
                    const u32 four = stream_bits(low, first, t0 * width, min(4, tokens - t0) * width), mask = (1u << width) - 1;
#pragma unroll
                    for (int i = 0; i < 4; ++i) value[i][k] = value[i][k] * (1 << width) + (int)(four >> (i * width) & mask);
                }
            } else if (BOUNDED && has_low) {
                take_symbols();
                int next = first_low;
#pragma unroll
                for (int k = 0; k < CPL; ++k) {
                    const int width = made_now((int)(widths >> (8 * k) & 255)), first = next;
                    if (width == 0) continue;
                    next += stream_words(tokens, width);
                    u32 bits[4];
                    if (low_stage && width <= 8) {  // four tokens' lie in two words
                        const u32 address = low_stage + 4 * (first + (t0 * width >> 5)), mask = (1u << width) - 1;
                        const u32 four = __funnelshift_r(load_shared(address), load_shared(address + 4), t0 * width);
#pragma unroll
                        for (int i = 0; i < 4; ++i) bits[i] = four >> (i * width) & mask;
                    } else {
                        const uint4 four = stream_bits_of_four(low, first, t0, tokens, width);
                        bits[0] = four.x, bits[1] = four.y, bits[2] = four.z, bits[3] = four.w;
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) value[i][k] = value[i][k] * (1 << width) + (int)bits[i] - (DELTA ? (1 << width) >> 1 : 0);
                }
                add_up(whole_sum);
            } else if (BOUNDED) {
                // The symbol is taken out and added in one instruction: as a shift, it would be taken out before the branch, for both.
                add_up([](int v, int more) { return __mulhi(v, 256) + more; });
            } else {
                take_symbols();
            }
        } else {
            const int b = t0 >> 5;
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const int width = b ? groups.klass[NUM_BLOCKS - 1][k] : groups.klass[0][k], first = b ? groups.low[NUM_BLOCKS - 1][k] : groups.low[0][k];
                if ((t0 & 31) == 0) {
                    add[k] = (b ? groups.base[NUM_BLOCKS - 1][k] : groups.base[0][k]) + WHOLE;
                    code[k] = 0;
                }
                u32 four[4] = {};
                if (STAGED) {  // four values of at most 8 bits lie in two words
                    const int bit = (t0 & 31) * width;
                    const u32 address = stage + 4 * (first + (bit >> 5));
                    const u32 bits = __funnelshift_r(load_shared(address), load_shared(address + 4), bit & 31), mask = (1u << width) - 1;
                    four[0] = bits & mask;
                    four[1] = bits >> width & mask;
                    four[2] = bits >> (2 * width) & mask;
                    four[3] = bits >> (3 * width) & mask;
                } else if (width && k < rows.count) {
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (t0 + i < tokens) four[i] = stream_bits(low, first, ((t0 & 31) + i) * width, width);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) value[i][k] = DELTA ? (int)(four[i] >> 1) ^ -(int)(four[i] & 1) : (int)four[i];
            }
            if (BOUNDED) add_up(whole_sum);
        }
        u32 plane[PLANES + 1][4];
#pragma unroll
        for (int p = 0; p < PLANES; ++p)
#pragma unroll
            for (int i = 0; i < 4; ++i) plane[p][i] = planes[p][i];
        if (PLANES && t0 + 4 < tokens) load_planes(t0 + 4);
        u32 out[4][PACKED];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32(&packed)[PACKED] = out[i];
#pragma unroll
            for (int j = 0; j < PACKED; ++j) packed[j] = 0;
            if constexpr (BOUNDED) {
                float f[CPL];
#pragma unroll
                for (int k = 0; k < CPL; ++k)
                    f[k] = __fmul_rn(WHOLE ? __int_as_float(value[i][k]) - ROUNDER : whole(value[i][k]), groups.step[k]);
#if KVF_ITEM == 2
                if constexpr (CPL % 2 == 0) {
#pragma unroll
                    for (int k = 0; k < CPL; k += 2) packed[k / 2] = as_word_pair(f[k], f[k + 1]);
                } else
#endif
                {
#pragma unroll
                    for (int k = 0; k < CPL; ++k) packed[k * KVF_ITEM / 4] |= as_word(f[k]) << (8 * (k * KVF_ITEM % 4));
                }
            } else {
#pragma unroll
                for (int k = 0; k < CPL; ++k) {
                    u32 bytes = 0;
#pragma unroll
                    for (int p = 0; p < PLANES; ++p) bytes |= (plane[p][i] >> (8 * k) & 255) << (8 * p);
                    const int v = ANS ? value[i][k] + add[k] * (1 << LOW_BITS) : value[i][k] + add[k];
                    packed[k * KVF_ITEM / 4] |= join(v, bytes) << (8 * (k * KVF_ITEM % 4));
                }
            }
        }
        rows.store_rows(row, t0, tokens, out);
    }
    return !ANS || (state == STATE_LOW && (int)(words - stage) + 2 * passed == 2 * at.num_words);
}
