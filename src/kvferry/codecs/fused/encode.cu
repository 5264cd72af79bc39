// Values to tiles, in one launch: gather, code, find the tile's place, write. Behind ans_encode.cu or bitpack_encode.cu.
//
// A tile's place is known once all before it in its chunk know their sizes: each warp publishes its size, then looks back (D.
// Merrill and M. Garland, "Single-pass parallel prefix scan with decoupled look-back", NVIDIA NVR-2016-002, section 4.1). Warps take tiles in
// order, so whatever a warp waits for is already being worked on.

// Where tiles go. Slots: chunk c to `slots + slot_index[c] * slot_bytes`. One payload: to `slots`, at most `slot_bytes`, with the
// directory beside it. `work`: zeroed; {ticket, unused, overflow[chunks], bound[chunks], status[tiles]}.
struct Sink {
    u8 *slots;
    i64 slot_bytes;
    const int *slot_index;
    const u64 *identities;
    u32 *directory;
    u32 *work;
    u8 *scratch;  // SCRATCH_BYTES for each warp
    SlotFacts facts;
    int num_chunks, max_relaxations;

    __device__ __forceinline__ u32 *overflow(int chunk) const { return work + 2 + chunk; }
    __device__ __forceinline__ u32 *bound(int chunk) const { return work + 2 + num_chunks + chunk; }
    __device__ __forceinline__ u32 *status(int tile) const { return work + 2 + 2 * num_chunks + tile; }
    __device__ __forceinline__ u8 *slot(int chunk) const { return slots + (PAGED ? slot_index[chunk] * slot_bytes : 0); }
    __device__ __forceinline__ i64 payload_at(int tiles) const { return PAGED ? SLOT_HEADER + 8 * (i64)tiles : 0; }
};

__shared__ Sink the_sink;

constexpr u32 SIZE_KNOWN = 1, PLACE_KNOWN = 2;  // status: words << 2 | one of these

__device__ __forceinline__ u32 peek(const u32 *p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void poke(u32 *p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }

// A tile's bound goes before its size: whoever has seen the sizes of a chunk has seen the bounds.
__device__ __forceinline__ void publish(const Sink &sink, const Tile &tile, float bound, int size, int lane) {
    if (BOUNDED && lane == 0 && !the_bounds.uniform()) {
        atomicMax(sink.bound(tile.chunk), __float_as_uint(bound));
        __threadfence();
    }
    if (lane == 0) poke(sink.status(tile.index), (u32)size / 4 << 2 | (tile.local ? SIZE_KNOWN : PLACE_KNOWN));
}

// Words of the chunk before a tile whose size is published.
__device__ __forceinline__ u32 look_back(const Sink &sink, int tile, int local, u32 words, int lane) {
    u32 before = 0;
    for (int at = local - 1; at >= 0; at -= 32) {
        const int mine = at - lane;
        u32 status;
        do status = mine >= 0 ? peek(sink.status(tile - local + mine)) : PLACE_KNOWN;
        while (__any_sync(FULL, (status & 3) == 0));
        const u32 placed = __ballot_sync(FULL, (status & 3) == PLACE_KNOWN);
        const int last = placed ? __ffs(placed) - 1 : 31;
        before += (u32)warp_sum(lane <= last ? (int)(status >> 2) : 0);
        if (placed) break;
    }
    if (local && lane == 0) poke(sink.status(tile), (before + words) << 2 | PLACE_KNOWN);
    return before;
}

// The tile's bytes and their checksum, which is linear: a lane adds up what it writes.
struct Writer {
    u8 *out;
    u64 sum;
    __device__ __forceinline__ void word(int index, u32 v) {
        ((u32 *)out)[index] = v;
        sum += hash_term(v, index);
    }
    template <typename Part>
    __device__ __forceinline__ void part(int at, Part v) {
        *(Part *)(out + at) = v;
        sum += hash_term((u32)v << (8 * (at & 3)), at >> 2);
    }
    // Zeros up to the next multiple of 4.
    __device__ __forceinline__ void pad(int at, int lane) {
        if (lane < (-at & 3)) out[at + lane] = 0;
    }
    // `count` staged values, as distances from the least, in `code`'s width.
    __device__ __forceinline__ void small(int at, const u32 *staged, u32 least, int count, int code, int lane) {
        if (code == 0) return;
        const int bits = small_bits(code), each = 32 / bits;
        for (int i = lane; i * each < count; i += 32) {
            u32 v = 0;
            for (int j = 0; j < each && i * each + j < count; ++j) v |= (staged[i * each + j] - least) << (j * bits);
            word(at / 4 + i, v);
        }
    }
};

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
        u32 ahead[4][Rows<CPL>::PACKED];
        rows.load_rows(rows.group(0), 0, tokens, ahead);
#pragma unroll 1
        for (int t0 = 0; t0 < tokens; t0 += 4) {
            u32 row[4][Rows<CPL>::PACKED];
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < Rows<CPL>::PACKED; ++j) row[i][j] = ahead[i][j];
            if (t0 + 4 < tokens) rows.load_rows(rows.group(t0 + 4), t0 + 4, tokens, ahead);
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
    constexpr int EACH = EXACT_WORDS / 32;
    u32 bits[EACH];
    int mine = 0, total;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        bits[i] = stage.exact[lane * EACH + i];
        mine += __popc(bits[i]);
    }
    int at = exclusive_sum(mine, lane, total);
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        for (u32 left = bits[i]; left; left &= left - 1) {
            const int position = (lane * EACH + i) * 32 + __ffs(left) - 1;
            const word_t *p = tile.value(s, position);
            writer.part<u16>(positions_at + 2 * at, (u16)position);
            writer.part<word_t>(exact_at + KVF_ITEM * at, p ? *p : (word_t)0);
            ++at;
        }
    writer.pad(positions_at + 2 * num_exact, lane);
    writer.pad(exact_at + KVF_ITEM * num_exact, lane);
    return writer.sum;
}

// The place of a tile of `size` bytes; null if the chunk has no room for it.
__device__ __forceinline__ u8 *place(const Source &s, const Sink &sink, const Tile &tile, int size, i64 &end, int lane) {
    const i64 before = 4 * (i64)look_back(sink, tile.index, tile.local, (u32)size / 4, lane);
    end = before + size;
    const i64 at = sink.payload_at(s.tiles_per_chunk);
    return at + end <= sink.slot_bytes ? sink.slot(tile.chunk) + at + before : nullptr;
}

__device__ __forceinline__ void write_directory(const Source &s, const Sink &sink, const Tile &tile, const Writer &writer, int size, i64 end, int lane) {
    const u64 sum = warp_sum64(writer.sum);
    u32 *directory = PAGED ? (u32 *)(sink.slot(tile.chunk) + SLOT_HEADER) : sink.directory;
    const u32 checksum = PAGED ? hash_end(sum + tile_seed(sink.identities + 2 * tile.chunk, tile.local, size)) : 0;
    if (lane < 2) directory[2 * tile.local + lane] = lane ? checksum : (u32)end;
}

// A chunk whose last tile has its place: its header, or a mark that it needs a looser bound.
__device__ __noinline__ void finish_chunk(int chunk, u32 payload, int relaxed, int lane) {
    const Sink &sink = the_sink;
    const int tiles = the_source.tiles_per_chunk;
    const bool fits = sink.payload_at(tiles) + (i64)payload <= sink.slot_bytes;
    if (!fits && relaxed < sink.max_relaxations) {
        if (lane == 0) poke(sink.overflow(chunk), 1);
        return;
    }
    const u64 *identity = sink.identities + 2 * chunk;
    u32 v = 0;
    if (lane == 0) v = SLOT_MAGIC;
    else if (lane == 1) v = SLOT_VERSION | SLOT_HEADER << 16;
    else if (lane == 2) v = sink.facts.kind;
    else if (lane == 3) v = (fits ? USABLE : REJECTED) | relaxed << 8 | sink.facts.relative_to << 16;
    else if (lane == 4) v = tiles;
    else if (lane == 5) v = payload;
    else if (lane == 6) v = BOUNDED && the_bounds.uniform() ? __float_as_uint(loosened(the_bounds.bound, relaxed)) : peek(sink.bound(chunk));
    else if (lane == 7) v = sink.facts.layout_digest;
    else if (lane < 12) v = (u32)(identity[(lane - 8) / 2] >> (lane & 1 ? 32 : 0));
    else if (lane == 12) v = sink.facts.tokens;
    const u64 sum = warp_sum64(lane < 15 ? hash_term(v, lane) : 0);
    if (lane == 15) v = hash_end(sum);
    if (lane < 16) ((u32 *)sink.slot(chunk))[lane] = v;
    if (lane == 0) poke(sink.overflow(chunk), 0);
}

#define KVF_EACH_CPL(CASE) KVF_CASE_1(CASE) KVF_CASE_2(CASE) KVF_CASE_3(CASE) KVF_CASE_4(CASE)
#define KVF_CASE_1(CASE)
#define KVF_CASE_2(CASE)
#define KVF_CASE_3(CASE)
#define KVF_CASE_4(CASE)
#if KVF_CPLS & 1
#undef KVF_CASE_1
#define KVF_CASE_1(CASE) CASE(1);
#endif
#if KVF_CPLS & 2
#undef KVF_CASE_2
#define KVF_CASE_2(CASE) CASE(2);
#endif
#if KVF_CPLS & 4
#undef KVF_CASE_3
#define KVF_CASE_3(CASE) CASE(3);
#endif
#if KVF_CPLS & 8
#undef KVF_CASE_4
#define KVF_CASE_4(CASE) CASE(4);
#endif

__device__ __forceinline__ u64 planes_of(const Tile &tile, u8 *out, int planes_at, int lane) {
#define KVF_PLANES(CPL) \
    case CPL:           \
        return write_planes<CPL>(tile.index, out, planes_at, lane)
    switch ((tile.channels + 31) / 32) { KVF_EACH_CPL(KVF_PLANES) }
    return 0;
}

// A tile on its way: coded, its size published, its bytes (but for the planes, which are as they are in the source) in the warp's
// scratch. It goes to its place one tile later, when those before it have long said how long they are: a warp hardly ever waits.
struct Pending {
    int tile, size, planes_at, gap;  // tile -1: none; gap: bytes of the planes; -1: a raw tile
    u64 sum;                         // of the lane
};

constexpr int SCRATCH_BYTES = 8192;

__device__ __noinline__ void settle(const Pending pending, const u8 *scratch, int relaxed, int lane) {
    const Source &s = the_source;
    const Sink &sink = the_sink;
    const Tile tile(s, pending.tile);
    i64 end;
    Writer writer = {place(s, sink, tile, pending.size, end, lane), pending.sum};
    if (writer.out) {
        if (pending.gap < 0) {
            writer.sum = write_raw(tile.index, writer.out, lane);
        } else {
            // All loads of a batch before its stores: one latency for 4 KiB.
            const uint4 *words = (const uint4 *)scratch;
            u32 *out = (u32 *)writer.out;
            const int before = pending.planes_at / 4, gap = pending.gap / 4, count = pending.size / 4 - gap;
            for (int first = 4 * lane; first < count; first += 4 * 32 * 8) {
                uint4 batch[8];
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (first + 128 * j < count) batch[j] = words[first / 4 + 32 * j];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const u32 four[4] = {batch[j].x, batch[j].y, batch[j].z, batch[j].w};
#pragma unroll
                    for (int q = 0; q < 4; ++q) {
                        const int i = first + 128 * j + q;
                        if (i < count) out[PLANES && i >= before ? i + gap : i] = four[q];
                    }
                }
            }
            if constexpr (PLANES > 0) writer.sum += planes_of(tile, writer.out, pending.planes_at, lane);
        }
        write_directory(s, sink, tile, writer, pending.size, end, lane);
    }
    if (PAGED && tile.local + 1 == s.tiles_per_chunk) finish_chunk(tile.chunk, (u32)end, relaxed, lane);
}

// Warps of a block go through a tile's phases together, so that the code of one phase at a time needs to be at hand. Warps without a
// tile come along.
constexpr int PHASES = RAW ? 0 : 2;

__device__ __forceinline__ void next_phase() { __syncthreads(); }

template <int CPL>
__device__ __forceinline__ void encode_tile(const Source &s, const Sink &sink, const Tile &tile, const Bounds &bounds, int relaxed, const int *radius,
                                            u32 tables, const Stage &stage, u8 *scratch, Pending &pending, int lane) {
    const int tokens = tile.tokens, channels = tile.channels, raw_size = tile.raw_size();
    if constexpr (RAW) {
        publish(sink, tile, 0.0f, raw_size, lane);
        settle(Pending{tile.index, raw_size, 0, -1, 0}, scratch, relaxed, lane);
        return;
    } else {
        const Rows<CPL> rows(s, tile, lane);
        Quantisers<CPL> quantisers = {};
        const Quantiser(&quantiser)[CPL] = quantisers.each;
        // The first rows are asked for before anything waits for others.
        u32 ahead[4][Rows<CPL>::PACKED];
        rows.load_rows(rows.group(0), 0, tokens, ahead);
        float most_bound = 0.0f;
        if constexpr (BOUNDED) {
            make_quantisers<CPL>(s, tile, rows, bounds, relaxed, quantisers.each, lane);
            most_bound = quantiser[0].bound;
            if (CHANNEL_STEPS) {
#pragma unroll
                for (int k = 0; k < CPL; ++k) most_bound = k < rows.count ? fmaxf(most_bound, quantiser[k].bound) : most_bound;
                most_bound = __uint_as_float((u32)warp_max((int)__float_as_uint(rows.count ? most_bound : 0.0f)));
            }
        }
        const int exact_words = (tokens * channels + 31) / 32;
        for (int i = lane; i < EXACT_WORDS; i += 32) stage.exact[i] = 0;
        if (lane == 0) stage.small[REPAIRS] = 0;
        __syncwarp();
        Gathered<CPL> gathered;
        Choice<CPL> choice;
        gather<CPL>(s, tile, rows, ahead, quantisers, radius, stage, lane, gathered, choice);
        if (BOUNDED && !gathered.fast) {
            __syncwarp();
            for (int i = lane; i < EXACT_WORDS; i += 32) stage.exact[i] = 0;
            gathered.any_exact = false;
            choice = choose_slowly<CPL>(rows, tokens, quantisers, radius);
        }
        __syncwarp();
        next_phase();
        const Layout<CPL> layout(choice, tokens, channels, rows.count, lane);
        __syncwarp();  // the list of repairs is done with
#pragma unroll
        for (int b = 0; b < NUM_GROUPS; ++b) {
            if (b * GROUP >= tokens) break;
            int index = layout.bases_before[b];
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                if (k >= rows.count) continue;
                stage.small[b * channels + lane * CPL + k] = (u32)choice.stored(b, k);
                if (choice.has_base(b, k)) stage.small[BASES_AT + index++] = (u32)choice.base[b][k];
            }
        }
        bool staged = false, any_exact = gathered.any_exact;
        int num_words = 0, num_exact = 0;
        u32 state = 0;
        const bool hopeless = layout.words_at >= raw_size;
        if (!hopeless) {
#if KVF_PACKING == 1
            const Coded coded = encode_ans<CPL>(rows, tokens, channels, quantisers, choice, gathered, stage, tables, lane);
            num_words = coded.num_words;
            state = coded.state;
            any_exact = coded.any_exact;
#else
            staged = stage_streams<CPL>(tokens, choice, layout, gathered, stage, rows.count, lane);
            if (BOUNDED && !gathered.fast) {
                // Only now is it known which values are stored in their own bits.
#pragma unroll 1
                for (int t = 0; t < tokens; ++t) {
                    int code[CPL];
                    u32 exact;
                    slow_codes<CPL>(rows, t, quantiser, code, exact);
#pragma unroll
                    for (int k = 0; k < CPL; ++k)
                        if (exact >> k & 1) mark_exact(stage, t * channels + lane * CPL + k);
                    any_exact |= exact != 0;
                }
                any_exact = __any_sync(FULL, any_exact);
                __syncwarp();
            }
#endif
            if (any_exact) {
                int mine = 0;
                for (int i = lane; i < exact_words; i += 32) mine += __popc(stage.exact[i]);
                num_exact = warp_sum(mine);
            }
        }
        const int positions_at = layout.words_at + pad4(2 * num_words), exact_at = positions_at + pad4(2 * num_exact);
        const int coded_size = exact_at + pad4(KVF_ITEM * num_exact);
        const bool raw = hopeless || coded_size >= raw_size;
        const int size = raw ? raw_size : coded_size;
        publish(sink, tile, most_bound, size, lane);
        next_phase();
        if (pending.tile >= 0) settle(pending, scratch, relaxed, lane);
        __syncwarp();
        pending = {tile.index, size, layout.planes_at, raw ? -1 : layout.steps_at - layout.planes_at, 0};
        if (raw) return;
        // What does not fit the scratch goes to its place at once.
        const bool at_once = size - pending.gap > SCRATCH_BYTES;
        i64 end = 0;
        u8 *const out = at_once ? place(s, sink, tile, size, end, lane) : scratch;
        if (!out) {
            pending.tile = -1;
            if (PAGED && tile.local + 1 == s.tiles_per_chunk) finish_chunk(tile.chunk, (u32)end, relaxed, lane);
            return;
        }
        Writer writer = {out, 0}, behind = {at_once ? out : out - pending.gap, 0};  // before and behind the planes
        if (lane < 4) {
            const u32 header[4] = {1u | (u32)layout.base_code << 8 | (u32)layout.class_code << 16 | (u32)layout.least_class << 24,
                                   (u32)num_words | (u32)num_exact << 16, (u32)layout.least_base,
                                   BOUNDED && !CHANNEL_STEPS ? __float_as_uint(quantiser[0].step) : 0u};
            writer.word(lane, lane == 0 ? header[0] : lane == 1 ? header[1] : lane == 2 ? header[2] : header[3]);
        }
        if (ANS && lane < (channels + CPL - 1) / CPL) writer.word(4 + lane, state);
        if constexpr (PLANES > 0)
            if (at_once) writer.sum += write_planes<CPL>(tile.index, writer.out, layout.planes_at, lane);
        if (CHANNEL_STEPS) {
#pragma unroll
            for (int k = 0; k < CPL; ++k)
                if (k < rows.count) behind.part<u16>(layout.steps_at + 2 * (lane * CPL + k), (u16)(__float_as_uint(quantiser[k].step) >> 16));
            behind.pad(layout.steps_at + 2 * channels, lane);
        }
        behind.small(layout.classes_at, stage.small, (u32)layout.least_class, layout.num_groups, layout.class_code, lane);
        behind.small(layout.bases_at, stage.small + BASES_AT, (u32)layout.least_base, layout.num_bases, layout.base_code, lane);
        if (layout.low_words) {
            if (!ANS && staged) {
                const int first_words = tokens > 32 ? __shfl_sync(FULL, layout.low_before[NUM_GROUPS - 1], 0) : layout.low_words;
#pragma unroll 4
                for (int i = lane; i < layout.low_words; i += 32)
                    behind.word(layout.low_at / 4 + i, load_shared(stage.codes + (i < first_words ? 4 * i : 8 * 128 * CPL + 4 * (i - first_words))));
            } else {
                behind.sum += write_streams<CPL>(tile.index, quantisers, stage, layout.low_at, behind.out, lane);
            }
        }
        if (ANS && num_words) {
            const u32 words = stage.codes + (tokens + 3) / 4 * 128 * CPL - 2 * num_words, last = (u32)(num_words - 1) / 2;
            const u32 misplaced = words & 2;  // the words begin in the middle of a word of memory
#pragma unroll 4
            for (u32 i = lane; i <= last; i += 32) {
                u32 v = load_shared(words - misplaced + 4 * i);
                if (misplaced) v = __funnelshift_r(v, load_shared(words + 2 + 4 * i), 16);
                if (i == last && (num_words & 1)) v &= 0xffff;
                behind.word(layout.words_at / 4 + i, v);
            }
        }
        if (num_exact) behind.sum += write_exact(tile.index, stage, positions_at, exact_at, num_exact, behind.out, lane);
        writer.sum += behind.sum;
        pending.sum = writer.sum;
        if (at_once) {
            write_directory(s, sink, tile, writer, size, end, lane);
            pending.tile = -1;
            if (PAGED && tile.local + 1 == s.tiles_per_chunk) finish_chunk(tile.chunk, (u32)end, relaxed, lane);
        }
        __syncwarp();
    }
}

__device__ __noinline__ void encode_tiles(int first, int count, u32 *ticket, int relaxed,
                                          const int *radius, u32 tables, const Stage stage) {
    const Source &s = the_source;
    const Sink &sink = the_sink;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u8 *scratch = sink.scratch + ((i64)blockIdx.x * (KVF_THREADS / 32) + warp) * SCRATCH_BYTES;
    Pending pending = {-1};
    // A block takes a round of tiles, one a warp. Asking for the next ticket ahead of time makes everyone behind it wait: tried, 6% slower.
    __shared__ int round;
    const int each = relaxed ? KVF_THREADS / 32 : max(1, min(KVF_THREADS / 32, (count + (int)gridDim.x - 1) / (int)gridDim.x));
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) round = (int)atomicAdd(ticket, (u32)each);
        __syncthreads();
        const int active = min(each, count - round), i = round + warp;
        if (active <= 0) break;
        if (warp >= active) {
            for (int p = 0; p < PHASES; ++p) next_phase();
            continue;
        }
        const Tile tile(s, first + i);
#define KVF_ENCODE(CPL)                                                                                                     \
    case CPL:                                                                                                               \
        encode_tile<CPL>(s, sink, tile, the_bounds, relaxed, radius, tables, stage, scratch, pending, lane);           \
        break
        switch ((tile.channels + 31) / 32) { KVF_EACH_CPL(KVF_ENCODE) }
        __syncwarp();
    }
    if (pending.tile >= 0) settle(pending, scratch, relaxed, lane);
}

// `retry` 0: all tiles. `retry` 1: the chunks that overflowed, one block each, at twice, four times, ... the bound until they fit.
extern "C" __global__ void __launch_bounds__(KVF_THREADS, KVF_BLOCKS)
    kvf_encode(Source src, Sink sink, Bounds bounds, const uint2 *tables, const int *radius, int retry) {
    extern __shared__ uint4 shared[];
    __shared__ u32 ticket;
    if (threadIdx.x == 0) {
        the_source = src;
        the_sink = sink;
        the_bounds = bounds;
    }
    uint2 *shared_tables = (uint2 *)shared;
    constexpr int TABLE_ENTRIES = ANS && !RAW ? NUM_TABLES * ALPHABET : 0;
    for (int i = threadIdx.x; i < TABLE_ENTRIES; i += blockDim.x) shared_tables[i] = tables[i];
    __syncthreads();
    u8 *mine = (u8 *)(shared_tables + TABLE_ENTRIES) + (threadIdx.x >> 5) * STAGE_BYTES;
    const Stage stage = {shared_address(mine), (u32 *)(mine + CODE_BYTES), (u32 *)(mine + CODE_BYTES) + EXACT_WORDS};
    const u32 tables_address = shared_address(shared_tables);
    if (!retry) {
        encode_tiles(0, src.num_tiles, sink.work, 0, radius, tables_address, stage);
        return;
    }
    const int tiles = src.tiles_per_chunk;
    for (int chunk = blockIdx.x; chunk < sink.num_chunks; chunk += gridDim.x) {
        for (int relaxed = 1; peek(sink.overflow(chunk)) != 0; ++relaxed) {
            __syncthreads();
            for (int i = threadIdx.x; i < tiles; i += blockDim.x) poke(sink.status(chunk * tiles + i), 0);
            if (threadIdx.x == 0) {
                ticket = 0;
                poke(sink.bound(chunk), 0);
            }
            __threadfence();
            __syncthreads();
            encode_tiles(chunk * tiles, tiles, &ticket, relaxed, radius, tables_address, stage);
            __threadfence();
            __syncthreads();
        }
        __syncthreads();
    }
}
