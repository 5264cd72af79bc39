// A tile's bytes and their checksum, which is linear: a lane adds up what it writes. Behind gather.cu.

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
    // `count` values in shared memory, as distances from the least, `EACH` to a word.
    template <int EACH>
    __device__ __forceinline__ void packed(int at, u32 staged, u32 least, int count, int lane) {
        for (int i = lane; i * EACH < count; i += 32) {
            u32 v = 0;
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                const u32 distance = load_shared(staged + 4 * (i * EACH + j)) - least;  // behind the last: of something else
                if (i * EACH + j < count) v |= distance << (j * (32 / EACH));
            }
            word(at / 4 + i, v);
        }
    }
    __device__ __forceinline__ void small(int at, u32 staged, u32 least, int count, int code, int lane);
};
