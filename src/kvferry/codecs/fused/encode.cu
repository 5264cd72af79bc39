// Values to tiles, in one launch: gather, code, publish the size; settle the tile before. Behind settle.cu.

// Warps of a block go through a tile's phases together, so that the code of one phase at a time needs to be at hand: gathering, coding, and
// (where that is worth a barrier) writing. Warps without a tile come along.
constexpr int PHASES = RAW ? 0 : LOSSLESS ? 2 : 1;

__device__ __forceinline__ void next_phase() { __syncthreads(); }

template <int CPL>
__device__ __forceinline__ void encode_tile(const Source &s, const Sink &sink, const Tile &tile, const Bounds &bounds, const int *radius,
                                            u32 tables, const Stage &stage, int lane) {
    Pending &pending = the_pending[threadIdx.x >> 5];
    const int tokens = tile.tokens, channels = tile.channels, raw_size = tile.raw_size();
    if constexpr (RAW) {
        publish(sink, tile, 0.0f, raw_size, lane);
        pending.set({tile.index, raw_size, 0, -1, level_of_round()}, 0, lane);
        __syncwarp();
        settle(lane);
        pending.clear(lane);
        return;
    } else {
        const Rows<CPL> rows(s, tile, lane);
        Quantisers<CPL> quantisers = {};
        const Quantiser(&quantiser)[CPL] = quantisers.each;
        // The first rows are asked for before anything waits for others.
        u32 ahead[AHEAD][4][Rows<CPL>::PACKED];
        const u8 *at;
        rows.begin(ahead, at, tokens);
        float most_bound = 0.0f;
        if constexpr (BOUNDED) {
            make_quantisers<CPL>(s, tile, rows, bounds, looser_at(level_of_round() & (FINAL - 1)), quantisers.each, lane);
            most_bound = quantiser[0].bound;
            if (CHANNEL_STEPS) {
#pragma unroll
                for (int k = 0; k < CPL; ++k) most_bound = k < rows.count ? fmaxf(most_bound, quantiser[k].bound) : most_bound;
                most_bound = __uint_as_float((u32)warp_max((int)__float_as_uint(rows.count ? most_bound : 0.0f)));
            }
        }
        const int exact_words = (tokens * channels + 31) / 32;
        for (int i = lane; i < EXACT_WORDS; i += 32) store_shared(stage.exact_at(i), 0);
        if (lane == 0) store_shared(stage.small_at(REPAIRS), 0);
        __syncwarp();
        Gathered gathered;
        Choice<CPL> choice;
        gather<CPL>(s, tile, rows, ahead, at, quantisers, radius, stage, lane, gathered, choice);
        if (BOUNDED && !gathered.fast) {
            __syncwarp();
            for (int i = lane; i < EXACT_WORDS; i += 32) store_shared(stage.exact_at(i), 0);
            gathered.wide = gathered.any_exact = false;
            choice = choose_slowly<CPL>(rows, tokens, quantisers, radius);
        }
        __syncwarp();
        next_phase();
        const Ranges ranges = CENTRED ? choice.spare(tokens, channels, rows.count) : choice.ranges(rows.count, (tokens + GROUP - 1) / GROUP);
        Layout<CPL> layout(choice, ranges, tokens, channels, rows.count, lane);
        __syncwarp();  // the list of repairs is done with
        int(&kept)[LAYOUT_WORDS] = the_layouts[threadIdx.x >> 5];
        if (ANS) layout.keep(kept, lane);
#pragma unroll
        for (int b = 0; b < NUM_GROUPS; ++b) {
            if (b * GROUP >= tokens) break;
            int index = layout.bases_before[b];
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                if (k >= rows.count) continue;
                store_shared(stage.small_at(b * channels + lane * CPL + k), (u32)choice.stored(b, k));
                if (choice.has_base(b, k)) store_shared(stage.small_at(BASES_AT + index++), (u32)choice.base[b][k]);
            }
        }
        bool staged = false, any_exact = gathered.any_exact;
        int num_words = 0, num_exact = 0;
        u32 state = 0;
        const bool hopeless = layout.words_at >= raw_size;
        // Low bits go to the scratch while the bytes that they are in are at hand. What lies there goes to its place before.
        const int gap = layout.steps_at - layout.planes_at;
        bool low_written = false;
        if (!hopeless) {
#if KVF_PACKING == 1
            bool narrow = true;  // four values' low bits make a word; more has only a channel far from zero whose differences are coded
#pragma unroll
            for (int k = 0; k < CPL; ++k) narrow &= k >= rows.count || choice.width(0, k) <= 8;
            low_written = gathered.fast && layout.low_words && layout.words_at - gap <= SCRATCH_BYTES && __all_sync(FULL, narrow);
            if (low_written) {
                settle(lane);
                pending.clear(lane);
            }
            const Coded coded = encode_ans<CPL>(tile.index, rows.count, tokens, channels, quantisers, choice, gathered, stage, tables,
                                                low_written ? own_scratch() - gap : nullptr, layout.low_at / 4 + layout.low_before[0], lane);
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
                for (int i = lane; i < exact_words; i += 32) mine += __popc(load_shared(stage.exact_at(i)));
                num_exact = warp_sum(mine);
            }
        }
        if (ANS) layout.fetch(kept);
        const int positions_at = layout.words_at + pad4(2 * num_words), exact_at = positions_at + pad4(2 * num_exact);
        const int coded_size = exact_at + pad4(KVF_ITEM * num_exact);
        const bool raw = hopeless || coded_size >= raw_size;
        const int size = raw ? raw_size : coded_size;
        publish(sink, tile, most_bound, size, lane);
        if (PHASES > 1) next_phase();
        settle(lane);
        if (ANS) layout.fetch(kept);  // once more, rather than held over the call
        pending.set({tile.index, size, layout.planes_at, raw ? -1 : gap, level_of_round()}, 0, lane);
        __syncwarp();
        if (raw) return;
        // What does not fit the scratch goes to its place at once.
        const bool at_once = size - gap > SCRATCH_BYTES;
        i64 end = 0;
        u8 *const out = at_once ? place(s, sink, tile, size, end, lane) : own_scratch();
        if (!out) {
            pending.clear(lane);
            settled(tile.chunk, tile.local, end, level_of_round(), lane);
            return;
        }
        Writer writer = {out, 0}, behind = {at_once ? out : out - gap, 0};  // before and behind the planes
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
        behind.small(layout.classes_at, stage.small_at(0), (u32)layout.least_class, layout.num_groups, layout.class_code, lane);
        behind.small(layout.bases_at, stage.small_at(BASES_AT), (u32)layout.least_base, layout.num_bases, layout.base_code, lane);
        if (layout.low_words) {
            if (!ANS && staged) {
                const int first_words = tokens > 32 ? __shfl_sync(FULL, layout.low_before[NUM_GROUPS - 1], 0) : layout.low_words;
#pragma unroll 4
                for (int i = lane; i < layout.low_words; i += 32)
                    behind.word(layout.low_at / 4 + i, load_shared(stage.codes + (i < first_words ? 4 * i : 8 * 128 * CPL + 4 * (i - first_words))));
            } else if (ANS && low_written && !at_once) {
                behind.sum += load_shared(stage.small_at(LOW_SUM_AT + 2 * lane)) | (u64)load_shared(stage.small_at(LOW_SUM_AT + 2 * lane + 1)) << 32;
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
        pending.sum[lane] = writer.sum;
        if (at_once) {
            write_directory(s, sink, tile, writer, size, end, lane);
            pending.clear(lane);
            settled(tile.chunk, tile.local, end, level_of_round(), lane);
        }
        __syncwarp();
    }
}

__device__ __noinline__ void encode_tiles(const int *radius, u32 tables, const Stage stage) {
    const Source &s = the_source;
    const Sink &sink = the_sink;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Pending &pending = the_pending[warp];
    pending.clear(lane);
    // A block takes a round of tiles, one a warp. Asking for the next ticket ahead of time makes everyone behind it wait: tried, 6% slower.
    for (;;) {
        u32 ticket = 0;
        __syncthreads();
        if (threadIdx.x == 0) {
            if (RETRY) {
                ticket = atomicAdd(&sink.tickets().again, 1u);
                the_round = listed_round(ticket);
            } else {
                const int first = (int)atomicAdd(&sink.tickets().first, (u32)the_share);
                the_round = {first, min(the_share, s.num_tiles - first), sink.ladder.first};
            }
        }
        __syncthreads();
        if (RETRY && !the_round.active) {
            // What this block holds back may be what it waits for.
            settle(lane);
            pending.clear(lane);
            __syncthreads();
            if (threadIdx.x == 0) the_round = wait_for_round(ticket);
            __syncthreads();
        }
        if (the_round.active <= 0) break;
        if (warp >= the_round.active) {
            for (int p = 0; p < PHASES; ++p) next_phase();
            continue;
        }
        const Tile tile(s, the_round.first + warp);
#define KVF_ENCODE(CPL)                                                                                                     \
    case CPL:                                                                                                               \
        encode_tile<CPL>(s, sink, tile, the_bounds, radius, tables, stage, lane);                                             \
        break
        switch ((tile.channels + 31) / 32) { KVF_EACH_CPL(KVF_ENCODE) }
        __syncwarp();
    }
    settle(lane);
}

// All tiles; with RETRY, the chunks that are on the list.
extern "C" __global__ void __launch_bounds__(KVF_THREADS, KVF_BLOCKS)
    kvf_encode(Source src, Sink sink, Bounds bounds, const uint2 *tables, const int *radius) {
    extern __shared__ uint4 shared[];
    if (RETRY && !sink.tickets().overflowed) return;
    if (threadIdx.x == 0) {
        the_source = src;
        the_sink = sink;
        the_sink.status_at = RETRY ? src.num_tiles : 0;
        the_bounds = bounds;
        const int count = RETRY ? (int)sink.tickets().overflowed * src.tiles_per_chunk : src.num_tiles;
        the_share = max(1, min(KVF_THREADS / 32, (count + (int)gridDim.x - 1) / (int)gridDim.x));
    }
    uint2 *shared_tables = (uint2 *)shared;
    constexpr int TABLE_ENTRIES = ANS && !RAW ? NUM_TABLES * ALPHABET : 0;
    for (int i = threadIdx.x; i < TABLE_ENTRIES; i += blockDim.x) shared_tables[i] = tables[i];
    __syncthreads();
    u8 *mine = (u8 *)(shared_tables + TABLE_ENTRIES) + (threadIdx.x >> 5) * STAGE_BYTES;
    const Stage stage = {shared_address(mine), (u32 *)(mine + CODE_BYTES), (u32 *)(mine + CODE_BYTES) + EXACT_WORDS};
    encode_tiles(radius, shared_address(shared_tables), stage);
}
