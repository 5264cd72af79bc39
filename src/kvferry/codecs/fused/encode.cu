// Values to tiles, in one launch: gather, code, find the tile's place, write. Behind write.cu.

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

// A chunk that was tried at `level` and takes `payload` bytes: its header, or it is tried again.
__device__ __noinline__ void finish_chunk(int chunk, u32 payload, int level, int lane) {
    const Sink &sink = the_sink;
    const int tiles = the_source.tiles_per_chunk;
    const i64 room = sink.slot_bytes - sink.payload_at(tiles);
    const bool fits = (i64)payload <= room;
    Chunk &known = sink.chunk(chunk);
    int next = -1;
    if (sink.ladder.retries && lane == 0) next = next_level(known, level, payload, room);
    next = __shfl_sync(FULL, next, 0);
    if (next >= 0) {
        // Whoever works on the chunk next finds it as if it were new. (A first try's tiles may still look at their own words.)
        if (RETRY)
            for (int i = lane; i < tiles; i += 32) poke(sink.status(chunk * tiles + i), 0);
        if (lane == 0) {
            poke(&known.bound, 0);
            poke(&known.settled, 0);
        }
        __threadfence();
        __syncwarp();
        if (lane == 0) list_again(chunk, next);
        return;
    }
    level &= FINAL - 1;
    const u64 *identity = sink.identities + 2 * chunk;
    const bool foreseen = BOUNDED && the_bounds.foreseen();
    const float bound = foreseen ? loosened(largest_bound(the_bounds, the_source.num_lines, lane), looser_at(level)) : 0.0f;
    u32 v = 0;
    if (lane == 0) v = SLOT_MAGIC;
    else if (lane == 1) v = SLOT_VERSION | SLOT_HEADER << 16;
    else if (lane == 2) v = sink.facts.kind;
    else if (lane == 3) v = (fits ? USABLE : REJECTED) | (sink.ladder.searches ? 0 : level) << 8 | sink.facts.relative_to << 16;
    else if (lane == 4) v = tiles;
    else if (lane == 5) v = payload;
    else if (lane == 6) v = foreseen ? __float_as_uint(bound) : peek(&known.bound);
    else if (lane == 7) v = sink.facts.layout_digest;
    else if (lane < 12) v = (u32)(identity[(lane - 8) / 2] >> (lane & 1 ? 32 : 0));
    else if (lane == 12) v = sink.facts.tokens;
    const u64 sum = warp_sum64(lane < 15 ? hash_term(v, lane) : 0);
    if (lane == 15) v = hash_end(sum);
    if (lane < 16) ((u32 *)sink.slot(chunk))[lane] = v;
    if (RETRY && lane == 0) atomicSub(&sink.tickets().open, 1u);
}

// A tile that is where it belongs, and ends at `end`. In a first try a chunk is finished by its last tile, the others' bytes being on
// their way. Who tries it again must not overtake those of the last try: then it is finished by whichever tile is the last to settle.
__device__ __forceinline__ void settled(int chunk, int local, i64 end, int level, int lane) {
    if constexpr (!PAGED) return;
    const Sink &sink = the_sink;
    const int tiles = the_source.tiles_per_chunk;
    const bool last = local + 1 == tiles;
    u32 payload = (u32)end;
    if constexpr (RETRY) {
        Chunk &known = sink.chunk(chunk);
        if (last && lane == 0) poke(&known.payload, payload);
        __threadfence();
        __syncwarp();
        u32 before = 0;
        if (lane == 0) before = atomicAdd(&known.settled, 1u);
        if (__shfl_sync(FULL, before, 0) + 1 != (u32)tiles) return;
        __threadfence();
        payload = peek(&known.payload);
    } else if (!last) {
        return;
    }
    finish_chunk(chunk, payload, level, lane);
}

__device__ __forceinline__ u64 planes_of(const Tile &tile, u8 *out, int planes_at, int lane) {
#define KVF_PLANES(CPL) \
    case CPL:           \
        return write_planes<CPL>(tile.index, out, planes_at, lane)
    switch ((tile.channels + 31) / 32) { KVF_EACH_CPL(KVF_PLANES) }
    return 0;
}

// A warp's tile on its way: coded, its size published, its bytes (but for the planes, which are as they are in the source) in the warp's
// scratch. It goes to its place one tile later, when those before it have long said how long they are: a warp hardly ever waits. In shared
// memory: registers are dear, and the first-level cache, which holds what there are too few of, is small beside that.
struct Pending {
    int tile, size, planes_at, gap;  // tile -1: none; gap: bytes of the planes; -1: a raw tile
    int level;                       // that it was tried at
    u64 sum[32];                     // of each lane

    // By all lanes; seen by all behind the next __syncwarp.
    __device__ __forceinline__ void set(const Pending &fields, u64 my_sum, int lane) {
        if (lane == 0) {
            tile = fields.tile;
            size = fields.size;
            planes_at = fields.planes_at;
            gap = fields.gap;
            if (RETRY) level = fields.level;
        }
        sum[lane] = my_sum;
    }
    __device__ __forceinline__ void clear(int lane) {
        if (lane == 0) tile = -1;
        __syncwarp();
    }
};

__shared__ Pending the_pending[KVF_THREADS / 32];
__shared__ int the_layouts[KVF_THREADS / 32][LAYOUT_WORDS];  // of the tiles that warps are coding

constexpr int SCRATCH_BYTES = 8192;

__device__ __forceinline__ int level_of_round() { return RETRY ? the_round.level : the_sink.ladder.first; }

// The warp's scratch. Made when it is needed, like much else here.
__device__ __forceinline__ u8 *own_scratch() {
    return the_sink.scratch + ((i64)blockIdx.x * (KVF_THREADS / 32) + (threadIdx.x >> 5)) * SCRATCH_BYTES;
}

// To its place, if there is one.
__device__ __noinline__ void settle(int lane) {
    const Pending &pending = the_pending[threadIdx.x >> 5];
    const int index = pending.tile;
    __syncwarp();  // all lanes have seen it before one of them sets the next
    if (index < 0) return;
    const Source &s = the_source;
    const Sink &sink = the_sink;
    const Tile tile(s, index);
    i64 end;
    Writer writer = {place(s, sink, tile, pending.size, end, lane), pending.sum[lane]};
    if (writer.out) {
        if (pending.gap < 0) {
            writer.sum = write_raw(tile.index, writer.out, lane);
        } else {
            // All loads of a batch before its stores: one latency for 2 KiB. A lane's words lie apart: a place is a multiple of 4, and stores
            // of more would not fill the sectors of memory that they touch.
            const u32 *words = (const u32 *)own_scratch();
            u32 *out = (u32 *)writer.out;
            const int before = pending.planes_at / 4, gap = pending.gap / 4, count = pending.size / 4 - gap;
            for (int first = lane; first < count; first += 32 * 16) {
                u32 batch[16];
#pragma unroll
                for (int j = 0; j < 16; ++j)
                    if (first + 32 * j < count) batch[j] = words[first + 32 * j];
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const int i = first + 32 * j;
                    if (i < count) out[PLANES && i >= before ? i + gap : i] = batch[j];
                }
            }
            if constexpr (PLANES > 0) writer.sum += planes_of(tile, writer.out, pending.planes_at, lane);
        }
        write_directory(s, sink, tile, writer, pending.size, end, lane);
    }
    settled(tile.chunk, tile.local, end, RETRY ? pending.level : sink.ladder.first, lane);
    __syncwarp();
}

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
            gathered.any_exact = false;
            choice = choose_slowly<CPL>(rows, tokens, quantisers, radius);
        }
        __syncwarp();
        next_phase();
        Layout<CPL> layout(choice, tokens, channels, rows.count, lane);
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
        if (ANS) layout.fetch(kept);
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
        encode_tile<CPL>(s, sink, tile, the_bounds, radius, tables, stage, lane);           \
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
