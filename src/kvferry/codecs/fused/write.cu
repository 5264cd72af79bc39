// The bytes of a tile's sections. Behind place.cu.

__device__ __noinline__ u64 write_small(u8 *out, int at, u32 staged, u32 least, int count, int code, int lane) {
    Writer writer = {out, 0};
    // 32 / small_bits(code) to a word.
    if (code == 1) writer.packed<8>(at, staged, least, count, lane);
    else if (code == 2) writer.packed<4>(at, staged, least, count, lane);
    else if (code == 3) writer.packed<2>(at, staged, least, count, lane);
    else if (code == 4) writer.packed<1>(at, staged, least, count, lane);
    return writer.sum;
}
// In `code`'s width.
__device__ __forceinline__ void Writer::small(int at, u32 staged, u32 least, int count, int code, int lane) {
    if (code) sum += write_small(out, at, staged, least, count, code, lane);
}

// Functions that are not inlined take and return values: what is passed by reference would live in memory everywhere.
__device__ __noinline__ u64 write_raw(int index, u8 *out, int lane) {
    const Source &s = the_source;
    const Tile tile(s, index);
    Writer writer = {out, 0};
    const int row_bytes = tile.channels * KVF_ITEM;
    if (lane == 0) writer.word(0, 0);
    const u64 alignment = (u64)tile.start | (u64)tile.page_bytes | (u64)tile.token_bytes | (u64)row_bytes;
    if (tile.channel_bytes == KVF_ITEM && alignment % 4 == 0) {
        const int row_words = row_bytes / 4;
#pragma unroll 1
        for (int t0 = 0; t0 < tile.tokens; t0 += 8) {  // eight tokens share a page
            const u8 *row = tile.row(s, t0);
            for (int c = lane; c < row_words; c += 32) {
                u32 batch[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) batch[i] = row && t0 + i < tile.tokens ? ((const u32 *)(row + i * tile.token_bytes))[c] : 0;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (t0 + i < tile.tokens) writer.word(1 + (t0 + i) * row_words + c, batch[i]);
            }
        }
    } else {
        const int count = tile.tokens * tile.channels;
        for (int i = lane; i < count; i += 32) {
            const word_t *p = tile.value(s, i);
            writer.part<word_t>(4 + i * KVF_ITEM, p ? *p : (word_t)0);
        }
        writer.pad(4 + count * KVF_ITEM, lane);
    }
    return writer.sum;
}

// Sign and mantissa bytes, read again from the source.
template <int CPL>
__device__ __noinline__ u64 write_planes(int index, u8 *out, int planes_at, int lane) {
    const Source &s = the_source;
    const Tile tile(s, index);
    Writer writer = {out, 0};
    const Rows<CPL> rows(s, tile, lane);
    const int tokens = tile.tokens, channels = tile.channels, plane_bytes = tokens * channels;
    if (CPL == 4 && channels % 4 == 0) {  // a lane's four bytes are a word
        constexpr int PLANES_AHEAD = Rows<CPL>::PACKED > 2 ? 1 : 3;
        u32 ahead[PLANES_AHEAD][4][Rows<CPL>::PACKED];
        const u8 *p;
        rows.begin(ahead, p, tokens);
#pragma unroll 1
        for (int t0 = 0; t0 < tokens; t0 += 4) {
            u32 row[4][Rows<CPL>::PACKED];
            rows.advance(row, ahead, p, t0 + 4 * PLANES_AHEAD, tokens);
            if (!rows.count) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (t0 + i >= tokens) break;
                const int index = (planes_at + (t0 + i) * channels) / 4 + lane;
#if KVF_ITEM == 2 && KVF_EXPONENT == 8
                const u32 low = (row[i][0] & 0x007f007fu) | (row[i][0] >> 8 & 0x00800080u);
                const u32 high = CPL == 4 ? (row[i][CPL / 2 - 1] & 0x007f007fu) | (row[i][CPL / 2 - 1] >> 8 & 0x00800080u) : 0;
                writer.word(index, __byte_perm(low, high, 0x6420));
#else
                u32 rest[CPL];
#pragma unroll
                for (int k = 0; k < CPL; ++k) split(Rows<CPL>::value(row[i], k), rest[k]);
#pragma unroll
                for (int q = 0; q < PLANES; ++q) {
                    u32 word = 0;
#pragma unroll
                    for (int k = 0; k < CPL; ++k) word |= (rest[k] >> (8 * q) & 255) << (8 * k);
                    writer.word(index + q * plane_bytes / 4, word);
                }
#endif
            }
        }
    } else {
#pragma unroll 1
        for (int t = 0; t < tokens; ++t) {
            u32 row[Rows<CPL>::PACKED];
            rows.load_row(t, row);
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                u32 rest;
                split(Rows<CPL>::value(row, k), rest);
#pragma unroll
                for (int q = 0; q < PLANES; ++q)
                    if (k < rows.count) writer.part<u8>(planes_at + q * plane_bytes + t * channels + lane * CPL + k, (u8)(rest >> (8 * q)));
            }
        }
        writer.pad(planes_at + PLANES * plane_bytes, lane);
    }
    return writer.sum;
}

// The dense streams of all groups, values taken from the source again.
template <int CPL>
__device__ __noinline__ u64 write_streams(int tile_index, const Quantisers<CPL> quantisers, const Stage stage, int low_at, u8 *out, int lane) {
    const Source &s = the_source;
    const Tile tile(s, tile_index);
    const Rows<CPL> rows(s, tile, lane);
    const Quantiser(&quantiser)[CPL] = quantisers.each;
    const int tokens = tile.tokens;
    Writer writer = {out, 0};
    Choice<CPL> choice;
    choice.apart = 0;
    int bases_before = 0, low_before[NUM_GROUPS], low_words = 0;
#pragma unroll
    for (int b = 0; b < NUM_GROUPS; ++b) {
        const int length = min(GROUP, tokens - b * GROUP);
        int my_bases = 0, my_words = 0, bases, words;
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const bool exists = k < rows.count && length > 0;
            const int stored = exists ? (int)stage.small[b * tile.channels + lane * CPL + k] : 0;
            choice.apart |= KVF_BASES == APART ? (u32)(stored & 1) << (CPL * b + k) : 0;
            choice.klass[b][k] = KVF_BASES == APART ? stored >> 1 : stored;
            my_bases += exists && choice.has_base(b, k);
            my_words += exists ? stream_words(length, choice.width(b, k)) : 0;
        }
        int index = bases_before + exclusive_sum(my_bases, lane, bases);
        low_before[b] = low_words + exclusive_sum(my_words, lane, words);
        bases_before += bases;
        low_words += words;
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            choice.base[b][k] = k < rows.count && length > 0 && choice.has_base(b, k) ? (int)stage.small[BASES_AT + index++] : 0;
    }
#pragma unroll
    for (int b = 0; b < NUM_GROUPS; ++b) {
        const int length = min(GROUP, tokens - b * GROUP);
        if (length <= 0) break;
        int at[CPL], width[CPL], filled[CPL], previous[CPL], index = low_at / 4 + low_before[b];
        u64 pending[CPL];
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            at[k] = index;
            width[k] = k < rows.count ? choice.width(b, k) : 0;
            index += stream_words(length, width[k]);
            filled[k] = previous[k] = 0;
            pending[k] = 0;
        }
#pragma unroll 1
        for (int t = b * GROUP; t < b * GROUP + length; ++t) {
            int code[CPL];
            u32 exact;
            slow_codes<CPL>(rows, t, quantiser, code, exact);
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                if (width[k] == 0) continue;
                int value = code[k];
                if constexpr (DELTA) {
                    value -= t == b * GROUP ? choice.base[b][k] : previous[k];
                    previous[k] = code[k];
                } else if constexpr (BOUNDED || !ANS) {
                    value -= choice.base[b][k];
                }
                u32 u = ANS ? (u32)value : DELTA ? zigzag(value) : (u32)value;
                if (ANS) u = (u + (BOUNDED ? (1u << width[k]) >> 1 : 0u)) & ((1u << width[k]) - 1);
                pending[k] |= (u64)u << filled[k];
                filled[k] += width[k];
                if (filled[k] >= 32) {
                    writer.word(at[k]++, (u32)pending[k]);
                    pending[k] >>= 32;
                    filled[k] -= 32;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            if (filled[k]) writer.word(at[k], (u32)pending[k]);
    }
    return writer.sum;
}

// Positions and bits of the values that are stored in their own bits, from the bitmap.
__device__ __noinline__ u64 write_exact(int index, const Stage stage, int positions_at, int exact_at, int num_exact, u8 *out,
                                        int lane) {
    const Source &s = the_source;
    const Tile tile(s, index);
    Writer writer = {out, 0};
    // First a list of positions (the bytes are done with), then a value a lane: their latencies overlap.
    constexpr int EACH = EXACT_WORDS / 32, MOST = CODE_BYTES / 2;
    int mine = 0, total;
    for (int i = 0; i < EACH; ++i) mine += __popc(stage.exact[lane * EACH + i]);
    const int before = exclusive_sum(mine, lane, total);
#pragma unroll 1
    for (int first = 0; first < num_exact; first += MOST) {
        __syncwarp();
        int at = before - first;
#pragma unroll 1
        for (int i = 0; i < EACH; ++i)
#pragma unroll 1
            for (u32 left = stage.exact[lane * EACH + i]; left; left &= left - 1, ++at)
                if (at >= 0 && at < MOST) store_shared_u16(stage.codes + 2 * at, (lane * EACH + i) * 32 + __ffs(left) - 1);
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < min(MOST, num_exact - first); i += 32) {
            const int position = (int)load_shared_u16(stage.codes + 2 * i);
            const word_t *p = tile.value(s, position);
            writer.part<u16>(positions_at + 2 * (first + i), (u16)position);
            writer.part<word_t>(exact_at + KVF_ITEM * (first + i), p ? *p : (word_t)0);
        }
    }
    writer.pad(positions_at + 2 * num_exact, lane);
    writer.pad(exact_at + KVF_ITEM * num_exact, lane);
    return writer.sum;
}

