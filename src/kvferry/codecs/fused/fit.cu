// Chunks that are tried again: at which bounds (codecs/fitting.py decides alike), and by whom. Behind place.cu.
//
// Chunks to be tried again stand on a list, of which blocks take rounds of tiles in order. A chunk that does not fit then either goes to
// the list's end. Who finds nothing on the list waits while chunks are open: their tiles are with blocks that run.

constexpr bool RETRY = KVF_RETRY;  // whether this kernel is for chunks that are tried again
constexpr int SPARE = 64, LEVELS_OF_PAYLOAD = 32, MOST_TRIES = 8, FINAL = 1 << 8;

// What the bounds of a level are multiplied by: a power of two, or of the eighth root of two. Of all first levels, one.
__device__ __forceinline__ float looser_at(int level) {
    if (!RETRY) return 1.0f;
    if (!the_sink.ladder.searches) return __uint_as_float((u32)(127 + level) << 23);
    const u32 mantissas[8] = {0x3f800000u, 0x3f8b95c2u, 0x3f9837f0u, 0x3fa5fed7u, 0x3fb504f3u, 0x3fc5672au, 0x3fd744fdu, 0x3feac0c7u};
    u32 mantissa = mantissas[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) mantissa = (level & 7) == i ? mantissas[i] : mantissa;
    return __uint_as_float(mantissa + (u32)((level >> 3) - 6 << 23));
}

// What to try next (level, and FINAL if that is the last try), after one at `level` that took `payload` of `room` bytes; -1: done. One
// thread at a time asks for a chunk.
__device__ __noinline__ int next_level(Chunk &chunk, int level, u32 payload, i64 room) {
    const Ladder &ladder = the_sink.ladder;
    const bool fits = (i64)payload <= room, is_final = level & FINAL;
    const int last = ladder.levels - 1;
    level &= FINAL - 1;
    if (is_final || !ladder.searches) return is_final || fits || level == last ? -1 : level + 1;
    const u32 around = chunk.around;
    int low = (int)(around & 255) - 1, high = ladder.levels - (int)(around >> 8 & 255);
    const int tries = (int)(around >> 16) + 1;
    if (fits) {
        high = level;
        chunk.high_bytes = payload;
    } else {
        low = level;
        chunk.low_bytes = payload;
    }
    chunk.around = (u32)(low + 1) | (u32)(ladder.levels - high) << 8 | (u32)tries << 16;
    if (fits && (room - (i64)payload) * SPARE <= room) return -1;
    if (low == last) return -1;
    if (high <= last && (high - low == 1 || tries >= MOST_TRIES)) return level == high ? -1 : high | FINAL;
    const i64 low_bytes = chunk.low_bytes, high_bytes = chunk.high_bytes;
    if (low < 0) return max(0, high - (int)max((i64)1, (room - high_bytes) * LEVELS_OF_PAYLOAD / max(high_bytes, (i64)1)));
    const i64 over = low_bytes - room;
    if (high == ladder.levels)
        return min(high - 1, low + (int)max((i64)1 << tries, (over * LEVELS_OF_PAYLOAD + low_bytes - 1) / low_bytes));
    int middle = low + (int)(over * (high - low) / (low_bytes - high_bytes));
    if (level == high) middle -= 1 + (high - middle) / 2;
    return min(max(middle, low + 1), high - 1);
}

// A round of tiles for the warps of a block: the first, how many, at which level (perhaps FINAL).
struct Round {
    int first, active, level;
};

__shared__ int the_share;  // tiles of a round, at most
__shared__ Round the_round;

__device__ __forceinline__ void list_again(int chunk, int level) {
    const Sink &sink = the_sink;
    Tickets &tickets = sink.tickets();
    if (!RETRY) {
        atomicAdd(&tickets.open, 1u);
        atomicAdd(&tickets.overflowed, 1u);
    }
    poke(sink.list() + atomicAdd(&tickets.listed, 1u), ((u32)chunk << 9 | (u32)level) + 1);
}

// Round number `ticket` of the list; none active: it is not on the list (yet).
__device__ __forceinline__ Round listed_round(u32 ticket) {
    const Sink &sink = the_sink;
    const int tiles = the_source.tiles_per_chunk, rounds = (tiles + the_share - 1) / the_share;
    const int place = (int)(ticket / (u32)rounds), start = (int)(ticket % (u32)rounds) * the_share;
    const u32 entry = place < sink.num_chunks * sink.ladder.retries ? peek(sink.list() + place) : 0;
    if (!entry) return {0, 0, 0};
    __threadfence();
    return {(int)((entry - 1) >> 9) * tiles + start, min(the_share, tiles - start), (int)((entry - 1) & 511)};
}

__device__ __forceinline__ Round wait_for_round(u32 ticket) {
    for (;;) {
        const bool over = peek(&the_sink.tickets().open) == 0;
        const Round round = listed_round(ticket);
        if (round.active || over) return round;
        __nanosleep(200);
    }
}
