// What the fused encoder and decoder share. Their other files are compiled behind this text, which is compiled behind intrinsics.cu.
//
// docs/format.md is the contract, packing/*/reference.py the truth: both make the same bytes. One warp codes one tile. Lane l
// owns channels l*CPL .. l*CPL+CPL-1, so a token's row is read with one vector load a lane, and in `ans` the 32 lanes are the 32
// interleaved rANS states.
//
// The host defines: KVF_CODEC (0 raw, 1 lossless, 2 bounded), KVF_PACKING (1 ans, 2 bitpack), KVF_ITEM (bytes of a value),
// KVF_MANTISSA and KVF_EXPONENT (bits), KVF_BASES (0 every group has a base, 1 none, 2 those kept apart), KVF_CHANNEL_STEPS (1 if
// each channel has its own step), KVF_CPLS (bit n-1: tiles with n channels a lane occur), KVF_PLACES (0: values lie in one tensor, tiles go to one payload;
// 1: in pages, to slots; 2: chunk after chunk, to slots).

#if KVF_ITEM == 1
typedef u8 word_t;
#elif KVF_ITEM == 2
typedef u16 word_t;
#else
typedef u32 word_t;
#endif

constexpr bool RAW = KVF_CODEC == 0, LOSSLESS = KVF_CODEC == 1, BOUNDED = KVF_CODEC == 2;
constexpr bool ANS = KVF_PACKING == 1, SLOTS = KVF_PLACES != 0, PAGED = KVF_PLACES == 1;
constexpr int PROB_BITS = 8, PROB_SCALE = 1 << PROB_BITS, ALPHABET = 64;
constexpr u32 STATE_LOW = 1u << 16;
constexpr int MAX_CLASS = 120, LAST_TWO_SIDED = 16, LAST_ONE_SIDED = 15;
// Each family as the host lays it out: one table more than the format has, whose only symbol, 0, has probability 1. It leaves
// the state as it is, so slots of a lane that have no channel, and tokens behind the last, are coded like the others.
constexpr int NUM_TABLES = (BOUNDED ? LAST_TWO_SIDED : LAST_ONE_SIDED) + 2, IDLE_TABLE = NUM_TABLES - 1;
constexpr int TOP_BIT = 8 * KVF_ITEM - 1;
constexpr u32 MANTISSA_MASK = (1u << KVF_MANTISSA) - 1, EXPONENT_MASK = (1u << KVF_EXPONENT) - 1;
// Lossless: sign and mantissa; whole bytes of it go to planes, the other bits stay under the exponent.
constexpr int REST_BITS = KVF_MANTISSA + 1, PLANES = LOSSLESS ? REST_BITS / 8 : 0, LOW_BITS = LOSSLESS ? REST_BITS % 8 : 0;
constexpr int ALL = 0, NONE = 1, APART = 2;
constexpr bool DELTA = KVF_BASES != ALL, CENTRED = BOUNDED && ANS && !DELTA, CHANNEL_STEPS = KVF_CHANNEL_STEPS;
constexpr int GROUP = ANS ? 64 : 32;  // tokens that share a class and a base
constexpr int TILE_TOKENS = 64;

// Where values lie. One tensor: tile i starts at element offsets[i] of `data`. Pages: line l is {address of page 0, bytes from page
// to page, bytes from token to token | channels << 32}; row c of `pages` lists the pages of chunk c, -1 for none. Chunk after chunk:
// `lines` as if pages lay in the order of chunks; `pages` only says which are wanted.
struct Source {
    u8 *data;
    const i64 *offsets;
    const int *tokens, *channels;
    i64 token_bytes, channel_bytes;
    const i64 *lines;
    const int *pages;
    int num_lines, chunk_pages, page_tokens, page_reciprocal;  // ceil(2**20 / page_tokens), or 0 where no tile crosses a page
    int num_tiles, tiles_per_chunk;
};

// The kernel's arguments, where every function reads them: as parameters they would be copied to each thread's own memory.
__shared__ Source the_source;

__device__ __forceinline__ int pad4(int n) { return (n + 3) & ~3; }

__device__ __forceinline__ float as_float(u32 word) {
#if KVF_ITEM == 4
    return __uint_as_float(word);
#elif KVF_EXPONENT == 8
    return __uint_as_float(word << 16);
#elif KVF_ITEM == 2
    return from_half(word);
#else
    return 0.0f;
#endif
}

// Round to the dtype, to nearest even; the result's bits.
__device__ __forceinline__ u32 as_word(float f) {
#if KVF_ITEM == 4
    return __float_as_uint(f);
#elif KVF_EXPONENT == 8
    return bfloat_bits(f);
#elif KVF_ITEM == 2
    return half_bits(f);
#else
    return 0u;
#endif
}

// Two values rounded to a 16-bit dtype, the first in the low half.
__device__ __forceinline__ u32 as_word_pair(float low, float high) { return KVF_EXPONENT == 8 ? bfloat_pair(low, high) : half_pair(low, high); }

// Differences of two such pairs, rounded to the dtype; and the larger of two of those, whatever their signs.
__device__ __forceinline__ u32 differences(u32 a, u32 b) { return KVF_EXPONENT == 8 ? bfloat_differences(a, b) : half_differences(a, b); }
__device__ __forceinline__ u32 larger_pair(u32 a, u32 b) { return KVF_EXPONENT == 8 ? larger_bfloats(a, b) : larger_halves(a, b); }

// 1.5 * 2**23: adding it rounds a float below 2**22 to an integer (to nearest even) and leaves that in the low mantissa bits.
// Conversion instructions do the same at a quarter of the rate.
constexpr float ROUNDER = 12582912.0f;
constexpr int ROUNDER_BITS = 0x4b400000;

__device__ __forceinline__ float whole(int code) { return __int_as_float(ROUNDER_BITS + code) - ROUNDER; }  // |code| <= 2**22

__device__ __forceinline__ void table_and_shift(int c, int &table, int &shift) {
    if (!BOUNDED) {
        table = c;
        shift = LOW_BITS;
    } else {
        shift = c <= LAST_TWO_SIDED ? 0 : (c - LAST_TWO_SIDED + 2) / 3;
        table = c - 3 * shift;
    }
}

__device__ __forceinline__ int exclusive_sum(int v, int lane, int &total) {
    int sum = v;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        int other = __shfl_up_sync(FULL, sum, d);
        if (lane >= d) sum += other;
    }
    total = __shfl_sync(FULL, sum, 31);
    return sum - v;
}
__device__ __forceinline__ int warp_min(int v) { return __reduce_min_sync(FULL, v); }
__device__ __forceinline__ int warp_max(int v) { return __reduce_max_sync(FULL, v); }
__device__ __forceinline__ int warp_sum(int v) { return __reduce_add_sync(FULL, v); }

__device__ __forceinline__ int small_bits(int code) { return code == 0 ? 0 : 2 << code; }

// Words of a dense stream of `width` bits a value.
__device__ __forceinline__ int stream_words(int tokens, int width) { return (tokens * width + 31) >> 5; }

// ---- slots and checksums (docs/format.md, "Slot") ----

constexpr int SLOT_HEADER = 64, SLOT_MAGIC = 0x5346564b, SLOT_VERSION = 1;
constexpr int USABLE = 1, REJECTED = 2;
constexpr int GOOD = 0, FOREIGN = 1, MISMATCH = 2, OTHER_IDENTITY = 3, NOT_USABLE = 4, CORRUPT = 5;
constexpr u64 GOLDEN = 0x9E3779B97F4A7C15ull;

__device__ __forceinline__ u32 hash_factor(int index) { return ((u32)index * 0x9E3779B1u + 0x85EBCA77u) | 1u; }
__device__ __forceinline__ u64 hash_term(u32 word, int index) { return (u64)word * hash_factor(index); }
__device__ __forceinline__ u32 hash_end(u64 sum) {
    sum ^= sum >> 32;
    sum *= 0xD6E8FEB86659FD93ull;
    return (u32)(sum ^ sum >> 32);
}
__device__ __forceinline__ u64 warp_sum64(u64 v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(FULL, v, d);
    return v;
}
__device__ __forceinline__ u64 tile_seed(const u64 *identity, int local, int size) {
    return identity[0] + identity[1] * GOLDEN + ((u64)(u32)local << 32) + (u64)(u32)size;
}

// What a slot says about itself, as its header has it.
struct SlotFacts {
    u32 kind;  // codec | dtype << 8 | packing << 16 | mode << 24
    u32 relative_to, layout_digest, tokens;
};

// ---- tiles ----

struct Tile {
    int index, chunk, local;  // of all, and in its chunk
    int tokens, channels;
    u8 *start;                // paged: token 0 of the line's page 0; else value (0, 0)
    i64 page_bytes, token_bytes, channel_bytes;
    const int *pages;         // of the chunk
    int first_page, num_pages, phase;  // phase: tokens of first_page before this tile

    __device__ __forceinline__ Tile(const Source &s, int i) : index(i) {
        if constexpr (SLOTS) {
            chunk = i / s.tiles_per_chunk;
            local = i - chunk * s.tiles_per_chunk;
            const int block = local / s.num_lines, line = local - block * s.num_lines;
            const i64 *l = s.lines + 3 * line;
            start = (u8 *)l[0];
            page_bytes = l[1];
            token_bytes = (i64)(u32)l[2];
            channels = (int)(l[2] >> 32);
            channel_bytes = KVF_ITEM;
            const int first = block * TILE_TOKENS;
            tokens = min(TILE_TOKENS, s.chunk_pages * s.page_tokens - first);
            first_page = first / s.page_tokens;
            phase = first - first_page * s.page_tokens;
            pages = s.pages + (i64)chunk * s.chunk_pages;
            num_pages = s.chunk_pages;
            if (!PAGED) start += ((i64)chunk * s.chunk_pages * s.page_tokens + first) * token_bytes;
        } else {
            chunk = 0;
            local = i;
            start = s.data + s.offsets[i] * KVF_ITEM;
            tokens = s.tokens[i];
            channels = s.channels[i];
            token_bytes = s.token_bytes;
            channel_bytes = s.channel_bytes;
            page_bytes = 0;
            pages = nullptr;
            first_page = num_pages = phase = 0;
        }
    }
    __device__ __forceinline__ int raw_size() const { return 4 + pad4(tokens * channels * KVF_ITEM); }
    // Row of a token; null where its page is absent.
    __device__ __forceinline__ u8 *row(const Source &s, int t) const {
        if constexpr (!PAGED) return start + t * token_bytes;
        const int at = phase + t, p = at / s.page_tokens, page = pages[first_page + p];
        return page < 0 ? nullptr : start + page * page_bytes + (at - p * s.page_tokens) * token_bytes;
    }
    __device__ __forceinline__ word_t *value(const Source &s, int position) const {
        const int t = position / channels;
        u8 *r = row(s, t);
        return r ? (word_t *)(r + (position - t * channels) * channel_bytes) : nullptr;
    }
};

// One lane's part of a tile's rows.
template <int CPL>
struct Rows {
    u64 place;  // paged: lane p has the address of the tile's p-th page, or 0; else the lane's first channel of token 0
    int token_bytes, channel_bytes;
    int offset;   // paged: the lane's first channel, bytes
    int phase, page_tokens, page_reciprocal;
    int count;    // channels of this lane that exist
    bool vector;  // the same in all lanes: each existing lane has all its channels, at an aligned address

    static constexpr int WIDTH = CPL * KVF_ITEM, PACKED = (WIDTH + 3) / 4;

    __device__ __forceinline__ Rows(const Source &s, const Tile &tile, int lane) {
        token_bytes = (int)tile.token_bytes;
        channel_bytes = (int)tile.channel_bytes;
        count = max(0, min(CPL, tile.channels - lane * CPL));
        u64 alignment = (u64)tile.start | (u64)token_bytes;
        if constexpr (PAGED) {
            alignment |= (u64)tile.page_bytes;
            offset = lane * WIDTH;
            phase = tile.phase;
            page_tokens = s.page_tokens;
            page_reciprocal = s.page_reciprocal;
            const int p = tile.first_page + lane;
            const int page = p < tile.num_pages && lane <= (phase + TILE_TOKENS - 1) / page_tokens ? tile.pages[p] : -1;
            place = page < 0 ? 0 : (u64)(tile.start + page * tile.page_bytes);
        } else {
            place = (u64)(tile.start + (i64)(lane * CPL) * channel_bytes);
        }
        vector = (WIDTH == 2 || WIDTH == 4 || WIDTH == 8 || WIDTH == 16) && CPL > 1 && channel_bytes == KVF_ITEM &&
                 tile.channels % CPL == 0 && alignment % WIDTH == 0;
    }
    // The lane's part of row t0, a multiple of 4: the three rows behind it follow at token_bytes. Null: no page.
    __device__ __forceinline__ u8 *group(int t0) const {
        if constexpr (!PAGED) return (u8 *)(place + (i64)t0 * token_bytes);
        const int at = phase + t0, p = (at * page_reciprocal) >> 20;
        const u64 page = __shfl_sync(FULL, place, p);
        return page ? (u8 *)(page + (i64)(at - p * page_tokens) * token_bytes + offset) : nullptr;
    }
    // A row in the general case: any strides, any number of channels.
    __device__ __forceinline__ void load(const u8 *p, u32 (&packed)[PACKED]) const {
#pragma unroll
        for (int k = 0; k < CPL; ++k)
            if (k < count) packed[k * KVF_ITEM / 4] |= (u32) * (const word_t *)(p + k * channel_bytes) << (8 * (k * KVF_ITEM % 4));
    }
    // Rows t0 .. t0+3 (t0 a multiple of 4) from `p` = group(t0), as they lie in memory; behind the last token it again; 0 where p is null.
    __device__ __forceinline__ void load_rows(const u8 *p, int t0, int tokens, u32 (&packed)[4][PACKED]) const {
        if ((PAGED && !p) || !count) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < PACKED; ++j) packed[i][j] = 0;
        } else if (vector && t0 + 4 <= tokens) {
#pragma unroll
            for (int i = 0; i < 4; ++i) load_global<WIDTH>(p + (i64)i * token_bytes, packed[i]);
        } else {
#pragma unroll 1
            for (int i = 0; i < 4; ++i) {
                u32 row[PACKED] = {};
                load(p + (i64)min(i, tokens - 1 - t0) * token_bytes, row);
#pragma unroll
                for (int j = 0; j < PACKED; ++j) {
                    packed[0][j] = i == 0 ? row[j] : packed[0][j];
                    packed[1][j] = i == 1 ? row[j] : packed[1][j];
                    packed[2][j] = i == 2 ? row[j] : packed[2][j];
                    packed[3][j] = row[j];
                }
            }
        }
    }
    // The four rows of `ahead` that are next; then those of `t0` (behind the last token: not) go to its end. `p`: group of the rows before
    // them, group(t0) from then on.
    template <int AHEAD>
    __device__ __forceinline__ void advance(u32 (&row)[4][PACKED], u32 (&ahead)[AHEAD][4][PACKED], const u8 *&p, int t0, int tokens) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < PACKED; ++j) {
                row[i][j] = ahead[0][i][j];
#pragma unroll
                for (int a = 0; a + 1 < AHEAD; ++a) ahead[a][i][j] = ahead[a + 1][i][j];
            }
        if (t0 >= tokens) return;
        if (!PAGED || (t0 & 7) == 0) p = group(t0);  // eight tokens share a page
        else if (p) p += 4 * token_bytes;
        load_rows(p, t0, tokens, ahead[AHEAD - 1]);
    }
    // The first rows, asked for before they are needed.
    template <int AHEAD>
    __device__ __forceinline__ void begin(u32 (&ahead)[AHEAD][4][PACKED], const u8 *&p, int tokens) const {
        p = group(0);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            if (a && 4 * a >= tokens) break;
            if (a & 1) p = p ? p + 4 * token_bytes : p;
            else if (a) p = group(4 * a);
            load_rows(p, 4 * a, tokens, ahead[a]);
        }
    }
    // Row t alone.
    __device__ __forceinline__ void load_row(int t, u32 (&packed)[PACKED]) const {
        const u8 *p = group(t & ~3);
#pragma unroll
        for (int j = 0; j < PACKED; ++j) packed[j] = 0;
        if (!p || !count) return;
        p += (i64)(t & 3) * token_bytes;
        if (vector) load_global<WIDTH>(p, packed);
        else load(p, packed);
    }
    __device__ static __forceinline__ u32 value(const u32 (&packed)[PACKED], int k) {
        return (packed[k * KVF_ITEM / 4] >> (8 * (k * KVF_ITEM % 4))) & (FULL >> (32 - 8 * KVF_ITEM));
    }
    // The value as a float: for bfloat16, one instruction.
    __device__ static __forceinline__ float number(const u32 (&packed)[PACKED], int k) {
#if KVF_ITEM == 2 && KVF_EXPONENT == 8
        return __uint_as_float(k & 1 ? packed[k / 2] & 0xffff0000u : packed[k / 2] << 16);
#else
        return as_float(value(packed, k));
#endif
    }
    // The other way round: four rows, of each four in order. `p`: of the rows before them, and of these from then on.
    __device__ __forceinline__ void store_rows(u8 *&p, int t0, int tokens, const u32 (&packed)[4][PACKED]) const {
        if (!PAGED || (t0 & 7) == 0) p = group(t0);  // eight tokens share a page
        else if (p) p += 4 * token_bytes;
        if ((PAGED && !p) || !count) return;
        if (vector && t0 + 4 <= tokens) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                store_global<WIDTH>(p + (i64)i * token_bytes, packed[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (t0 + i < tokens)
#pragma unroll
                    for (int k = 0; k < CPL; ++k)
                        if (k < count) *(word_t *)(p + (i64)i * token_bytes + k * channel_bytes) = (word_t)value(packed[i], k);
        }
    }
};

// CASE(n); for each number of channels a lane that occurs.
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
