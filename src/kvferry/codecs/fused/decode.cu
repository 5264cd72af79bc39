// Tiles to values in one launch. Behind common.cu.

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

// `width` bits of a dense stream from bit `bit` on; a stream's last word is read only where it is needed.
template <bool SHARED>
__device__ __forceinline__ u32 stream_bits(u32 shared, const u32 *memory, int first, int bit, int width) {
    const int word = first + (bit >> 5), from = bit & 31;
    const u32 low = SHARED ? load_shared(shared + 4 * word) : memory[word];
    u32 high = 0;
    if (from + width > 32) high = SHARED ? load_shared(shared + 4 * word + 4) : memory[word + 1];
    const u32 bits = __funnelshift_r(low, high, from);
    return width == 32 ? bits : bits & ((1u << width) - 1);
}

// Added to bases, so that a code is a float's bits as it is summed up (see `whole`).
constexpr int WHOLE = BOUNDED && !DELTA ? ROUNDER_BITS : 0;

// The tokens of a tile, in order, four at a time. Returns whether the lane ended as it must. `has_low` (ans): some channel has raw low bits.
// STAGED (bitpack): the groups lie in shared memory.
template <int CPL, bool STAGED>
__device__ __forceinline__ bool decode_rows(const Rows<CPL> &rows, const Tile &tile, const u8 *in, const Sections &at, const Groups<CPL> &groups,
                                            u32 state, bool has_low, u32 tables, u32 stage, int lane) {
    constexpr int PACKED = Rows<CPL>::PACKED;
    const u32 below = lanes_before();
    const int tokens = tile.tokens, channels = tile.channels;
    const u32 *low = (const u32 *)(in + at.low_at);
    u32 words = stage;  // address of the next rANS word
    int passed = 0;     // words before the window
    int code[CPL], add[CPL], shift[CPL];
    u32 slots[CPL];
    const u32 idle = tables + IDLE_TABLE * PROB_SCALE * 4;
#pragma unroll
    for (int k = 0; k < CPL; ++k) {
        int table;
        table_and_shift(groups.klass[0][k], table, shift[k]);
        if (k >= rows.count) {
            table = IDLE_TABLE;
            shift[k] = 0;
        }
        slots[k] = tables + table * PROB_SCALE * 4;
        code[k] = 0;
        add[k] = groups.base[0][k] + WHOLE;
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
        int value[4][CPL];
        if constexpr (ANS) {
            // Four tokens take at most 2 * CPL * 32 words.
            if (words - stage > 4 * STAGE_WORDS - 4 * CPL * 32 && at.num_words - passed > 2 * STAGE_WORDS) {
                passed += (int)(words - stage) / 2 & ~1;
                const u32 offset = (words - stage) & 2;
                const u32 *more = (const u32 *)(in + at.words_at) + passed / 2;
                const int count = min(STAGE_WORDS, (at.num_words - passed + 1) / 2);
                __syncwarp();
                for (int i = lane; i < count; i += 32) store_shared(stage + 4 * i, more[i]);
                __syncwarp();
                words = stage + offset;
            }
            const auto decode_symbols = [&](bool tail) {
#pragma unroll
                for (int pair = 0; pair < 2 * CPL; ++pair) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int step = 2 * pair + half, i = step / CPL, k = step % CPL;
                        // {frequency (16 bits), slot - cum (8), symbol (8, signed)}. The low byte by a permutation: as a mask it costs one more.
                        const u32 slot = table_word((tail && i && t0 + i >= tokens ? idle : slots[k]) + 4 * __byte_perm(state, 0, 0x4440));
                        state = (slot & 0xffff) * (state >> PROB_BITS) + __byte_perm(slot, 0, 0x4442);
                        value[i][k] = (int)slot >> 24;
                    }
                    take_word(state, words, below);
                }
            };
            // Behind the last token nothing is coded. Twice the code: choosing in every step costs more, and the other is hardly ever there.
            if (t0 + 4 > tokens) decode_symbols(true);
            else decode_symbols(false);
            if (LOW_BITS || (BOUNDED && has_low)) {
#pragma unroll
                for (int k = 0; k < CPL; ++k) {
                    const int width = shift[k];
                    if (width == 0) continue;
                    if (width <= 8) {  // of four tokens at once
                        const u32 four = stream_bits<false>(0, low, groups.low[0][k], t0 * width, min(4, tokens - t0) * width), mask = (1u << width) - 1;
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            value[i][k] = value[i][k] * (1 << width) + (int)(four >> (i * width) & mask) - (BOUNDED ? (1 << width) >> 1 : 0);
                        continue;
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (t0 + i < tokens)
                            value[i][k] = value[i][k] * (1 << width) + (int)stream_bits<false>(0, low, groups.low[0][k], (t0 + i) * width, width) -
                                          (BOUNDED ? (1 << width) >> 1 : 0);
                }
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
                        if (t0 + i < tokens) four[i] = stream_bits<false>(0, low, first, ((t0 & 31) + i) * width, width);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) value[i][k] = DELTA ? (int)(four[i] >> 1) ^ -(int)(four[i] & 1) : (int)four[i];
            }
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
                for (int k = 0; k < CPL; ++k) {
                    code[k] = value[i][k] + add[k] + (DELTA ? code[k] : 0);
                    if (DELTA) add[k] = 0;  // the base was the first difference's
                    f[k] = __fmul_rn(WHOLE ? __int_as_float(code[k]) - ROUNDER : whole(code[k]), groups.step[k]);
                }
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
        rows.store_rows(t0, tokens, out);
    }
    return !ANS || (state == STATE_LOW && (int)(words - stage) + 2 * passed == 2 * at.num_words);
}

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
    const int stage_first = (ANS ? at.words_at : at.low_at) / 4;
    const int stage_count = !good ? 0 : ANS ? min(STAGE_WORDS, (at.num_words + 1) / 2) : staged ? at.low_words : 0;
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
        good = decode_rows<CPL, false>(rows, tile, in, at, groups, state, __any_sync(FULL, any_low), tables, stage, lane);
    } else {
        if (staged) good = decode_rows<CPL, true>(rows, tile, in, at, groups, state, false, tables, stage, lane);
        else good = decode_rows<CPL, false>(rows, tile, in, at, groups, state, false, tables, stage, lane);
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
        if constexpr (PAGED) {
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
        good = decode_tile<CPL>(dst, tile, in, size, PAGED, seed, checksum, tables_address, stage, lane);                   \
        break
            switch ((tile.channels + 31) / 32) { KVF_EACH_CPL(KVF_DECODE) }
            if (!good) status = CORRUPT;
        }
        __syncwarp();
        if (PAGED) {
            if (status != GOOD && lane == 0) atomicMax(input.status + tile.chunk, status);
        } else if (lane == 0) {
            input.status[i] = status != GOOD;
        }
    }
}
