// Tiles to values in one launch. Behind decode_rows.cu.

// Decodes the tile at `in`. False where its bytes contradict themselves.
template <int CPL>
__device__ __forceinline__ bool decode_tile(const Source &s, const Tile &tile, const u8 *in, int size, bool checked, u64 seed, u32 checksum, u32 tables,
                                            u32 stage, int lane) {
    const int tokens = tile.tokens, channels = tile.channels, raw_size = tile.raw_size();
    const u32 *input_words = (const u32 *)in;
    if (size < 4 || size > raw_size) return false;
    const u32 kind = in[0];
    // Where what is staged lies: known from the header, classes and bases, but these are not trusted before the checksum is seen.
    const int lanes = (channels + CPL - 1) / CPL;
    const int planes_at = 16 + (ANS ? 4 * lanes : 0);
    const int steps_at = planes_at + pad4(PLANES * tokens * channels);
    const int classes_at = steps_at + (CHANNEL_STEPS ? pad4(2 * channels) : 0);
    const int blocks = (tokens + GROUP - 1) / GROUP, num_groups = blocks * channels;
    bool good = !RAW && kind == 1 && size >= classes_at && size >= 16 && size < raw_size;
    u32 header[4] = {};
    if (good) {
#pragma unroll
        for (int i = 0; i < 4; ++i) header[i] = input_words[i];
    }
    const int base_code = header[0] >> 8 & 255, class_code = header[0] >> 16 & 255, least_class = header[0] >> 24;
    Sections at;
    at.planes_at = planes_at;
    at.num_words = header[1] & 0xffff;
    at.num_exact = header[1] >> 16;
    good = good && base_code <= 4 && class_code <= 2 && (ANS || at.num_words == 0);
    const int bases_at = classes_at + pad4((num_groups * small_bits(class_code) + 7) / 8);
    good = good && size >= bases_at;
    const Rows<CPL> rows(s, tile, lane);
    Groups<CPL> groups;
    groups.apart = 0;
    int num_bases = 0;
    at.low_words = 0;
    bool mine_good = true, narrow = true, any_low = false;
    int base_index[NUM_BLOCKS], low_index[NUM_BLOCKS];
    if (good) {
#pragma unroll
        for (int b = 0; b < NUM_BLOCKS; ++b) {
            int my_bases = 0, my_words = 0, bases, words;
#pragma unroll
            for (int k = 0; k < CPL; ++k) {
                const bool exists = k < rows.count && b < blocks;
                int klass = exists ? (int)get_small(in + classes_at, b * channels + lane * CPL + k, class_code) + least_class : 0;
                if (KVF_BASES == APART) {
                    groups.apart |= (u32)(klass & 1) << (CPL * b + k);
                    klass >>= 1;
                }
                const bool fine = klass <= (ANS ? BOUNDED ? MAX_CLASS : LAST_ONE_SIDED : 32);
                mine_good &= fine;
                groups.klass[b][k] = fine ? klass : 0;
                my_bases += exists && (KVF_BASES == ALL || (KVF_BASES == APART && groups.apart >> (CPL * b + k) & 1));
                const int width = exists ? groups.width(b, k) : 0;
                narrow &= width <= 8;
                any_low |= width != 0;
                my_words += exists ? stream_words(min(GROUP, tokens - b * GROUP), width) : 0;
            }
            base_index[b] = num_bases + exclusive_sum(my_bases, lane, bases);
            low_index[b] = at.low_words + exclusive_sum(my_words, lane, words);
            num_bases += bases;
            at.low_words += words;
        }
    }
    good = __all_sync(FULL, good && mine_good);
    at.low_at = bases_at + pad4((num_bases * small_bits(base_code) + 7) / 8);
    at.words_at = at.low_at + 4 * at.low_words;
    at.positions_at = at.words_at + pad4(2 * at.num_words);
    at.exact_at = at.positions_at + pad4(2 * at.num_exact);
    good = good && size == at.exact_at + pad4(KVF_ITEM * at.num_exact);
    const bool staged = !ANS && good && __all_sync(FULL, narrow) && at.low_words < STAGE_WORDS;
    // One pass over the bytes: checksum, and what decoding needs often into shared memory.
    const int low_staged = ANS && BOUNDED && at.low_words <= STAGE_WORDS / 2 ? at.low_words : 0;  // words lie behind them, here and there
    const int stage_first = (ANS ? at.words_at : at.low_at) / 4 - low_staged;
    const int stage_count = !good ? 0 : ANS ? min(STAGE_WORDS, low_staged + (at.num_words + 1) / 2) : staged ? at.low_words : 0;
    // All loads of a batch before the first is used: one latency for 1 KiB.
    u64 sum = 0;
    const int first = checked ? 0 : stage_first, last = checked ? size / 4 : stage_first + stage_count;
#pragma unroll 1
    for (int start = first + lane; start < last; start += 32 * 16) {
        u32 batch[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) batch[j] = start + 32 * j < last ? input_words[start + 32 * j] : 0;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int i = start + 32 * j;
            if (checked) sum += hash_term(batch[j], i);  // a zero adds nothing
            if ((u32)(i - stage_first) < (u32)stage_count) store_shared(stage + 4 * (i - stage_first), batch[j]);
        }
    }
    if (checked && hash_end(warp_sum64(sum) + seed) != checksum) return false;
    __syncwarp();
    if (kind == 0) return size == raw_size && read_raw(tile.index, in, lane);
    if (RAW || !good) return false;

#pragma unroll
    for (int b = 0; b < NUM_BLOCKS; ++b)
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            const bool exists = k < rows.count && b < blocks;
            const bool has_base = exists && (KVF_BASES == ALL || (KVF_BASES == APART && groups.apart >> (CPL * b + k) & 1));
            groups.base[b][k] = has_base ? (int)(get_small(in + bases_at, base_index[b], base_code) + header[2]) : 0;
            base_index[b] += has_base;
            groups.low[b][k] = low_index[b];
            low_index[b] += exists ? stream_words(min(GROUP, tokens - b * GROUP), groups.width(b, k)) : 0;
        }
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        groups.step[k] = __uint_as_float(header[3]);
        if (CHANNEL_STEPS && k < rows.count) groups.step[k] = __uint_as_float((u32)((const u16 *)(in + steps_at))[lane * CPL + k] << 16);
    }
    const u32 state = ANS && lane < lanes ? input_words[4 + lane] : STATE_LOW;
    if constexpr (ANS) {
        good = decode_rows<CPL, false>(rows, tile, in, at, groups, state, __any_sync(FULL, any_low), tables, low_staged ? stage : 0, stage + 4 * low_staged,
                                       STAGE_WORDS - low_staged, lane);
    } else {
        if (staged) good = decode_rows<CPL, true>(rows, tile, in, at, groups, state, false, tables, 0, stage, 0, lane);
        else good = decode_rows<CPL, false>(rows, tile, in, at, groups, state, false, tables, 0, stage, 0, lane);
    }
    __syncwarp();
    const u16 *positions = (const u16 *)(in + at.positions_at);
    const word_t *exact = (const word_t *)(in + at.exact_at);
    for (int i = lane; i < at.num_exact; i += 32) {
        if (positions[i] < tokens * channels) {
            word_t *p = tile.value(s, positions[i]);
            if (p) *p = exact[i];
        } else good = false;
    }
    return __all_sync(FULL, good);
}

extern "C" __global__ void __launch_bounds__(KVF_THREADS, KVF_BLOCKS) kvf_decode(Source dst, Input input, const u32 *tables) {
    extern __shared__ uint4 shared[];
    constexpr int TABLE_WORDS = ANS && !RAW ? NUM_TABLES * PROB_SCALE : 0, WARPS = KVF_THREADS / 32;
    u32 *shared_tables = (u32 *)shared;
    if (threadIdx.x == 0) the_source = dst;
    for (int i = threadIdx.x; i < TABLE_WORDS / 4; i += blockDim.x) shared[i] = ((const uint4 *)tables)[i];
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 tables_address = shared_address(shared_tables), stage = shared_address(shared_tables + TABLE_WORDS + warp * STAGE_WORDS);
    for (int i = warp * gridDim.x + blockIdx.x; i < dst.num_tiles; i += gridDim.x * WARPS) {
        const Tile tile(dst, i);
        const u8 *in = nullptr;
        int size = 0, status = GOOD;
        u32 checksum = 0;
        u64 seed = 0;
        bool wanted = true;
        if constexpr (SLOTS) {
            const int pages = (tile.phase + tile.tokens + dst.page_tokens - 1) / dst.page_tokens;
            wanted = __any_sync(FULL, lane < pages && tile.pages[tile.first_page + min(lane, pages - 1)] >= 0);
            status = find_tile(dst, input, tile, in, size, checksum, lane);
            if (status == CORRUPT && !wanted) status = GOOD;
            seed = tile_seed(input.identities + 2 * tile.chunk, tile.local, size);
        } else {
            in = input.slots + input.starts[i];
            size = input.sizes[i];
        }
        if (status == GOOD && wanted) {
            bool good = false;
#define KVF_DECODE(CPL)                                                                                                     \
    case CPL:                                                                                                               \
        good = decode_tile<CPL>(dst, tile, in, size, SLOTS, seed, checksum, tables_address, stage, lane);                   \
        break
            switch ((tile.channels + 31) / 32) { KVF_EACH_CPL(KVF_DECODE) }
            if (!good) status = CORRUPT;
        }
        __syncwarp();
        if (SLOTS) {
            if (status != GOOD && lane == 0) atomicMax(input.status + tile.chunk, status);
        } else if (lane == 0) {
            input.status[i] = status != GOOD;
        }
    }
}
