// Groups of 32 tokens at the smallest width that holds them. Behind gather.cu.
//
// Packed words take the place of the bytes they are made of: block b of 32 tokens at b * BLOCK_BYTES. Where they are longer than
// that, or the tile takes the slow way, they are written to the slot straight from the source (write_streams).

template <int CPL>
__device__ __forceinline__ bool stage_streams(int tokens, const Choice<CPL> &choice, const Layout<CPL> &layout, const Gathered &gathered,
                                              const Stage &stage, int count, int lane) {
    constexpr int BLOCK_BYTES = 8 * 128 * CPL;
    if (!gathered.fast) return false;
    const int blocks = (tokens + 31) / 32, first_words = blocks > 1 ? __shfl_sync(FULL, layout.low_before[NUM_GROUPS - 1], 0) : layout.low_words;
    if (max(first_words, layout.low_words - first_words) * 4 > BLOCK_BYTES) return false;
    // One piece of code for all blocks and channels: unrolled, it would not fit the instruction cache.
#pragma unroll 1
    for (int b = 0; b < blocks; ++b) {
        const int length = min(32, tokens - 32 * b);
        u32 packed[8][CPL];
        int widths[CPL], bases[CPL];  // bases as bytes
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            if (4 * g < length) load_shared_words<CPL>(stage.codes + b * BLOCK_BYTES + (g * 32 + lane) * CPL * 4, packed[g]);
        }
#pragma unroll
        for (int k = 0; k < CPL; ++k) {
            widths[k] = k < count ? b ? choice.klass[NUM_GROUPS - 1][k] : choice.klass[0][k] : 0;
            bases[k] = (b ? choice.base[NUM_GROUPS - 1][k] : choice.base[0][k]) - stage.origin(lane * CPL + k);
        }
        __syncwarp();
        u32 at = stage.codes + b * BLOCK_BYTES + 4 * (b ? layout.low_before[NUM_GROUPS - 1] - first_words : layout.low_before[0]);
#pragma unroll 1
        for (int left = CPL; left; --left) {
            const int width = widths[0], first_base = bases[0];
            u32 mine[8];
            // The next channel takes this one's place: arrays in registers know no other index.
#pragma unroll
            for (int g = 0; g < 8; ++g) {
                mine[g] = packed[g][0];
#pragma unroll
                for (int k = 0; k + 1 < CPL; ++k) packed[g][k] = packed[g][k + 1];
            }
#pragma unroll
            for (int k = 0; k + 1 < CPL; ++k) {
                widths[k] = widths[k + 1];
                bases[k] = bases[k + 1];
            }
            if (width == 0) continue;
            u32 pending = 0;
            int filled = 0;
            const u32 base = 0x01010101u * ((u32)first_base & 255);
#pragma unroll
            for (int g = 0; g < 8; ++g) {
                if (4 * g >= length) break;
                if constexpr (!DELTA) {
                    // Four values of at most 8 bits at once. Behind the last token bytes are 0 and stay so.
                    u32 four = mine[g] - base;
                    if (4 * g + 4 > length) {
                        four = 0;
                        for (int i = 0; 4 * g + i < length; ++i) four |= ((mine[g] >> (8 * i) & 255) - (base & 255)) << (8 * i);
                    }
                    const u32 two = (four & 0x00ff00ffu) + ((four >> 8 & 0x00ff00ffu) << width);
                    const u64 bits = (u64)((two & 0xffff) + ((u64)(two >> 16) << (2 * width))) << filled;
                    pending |= (u32)bits;
                    // Of the tokens that exist: a word too many would fall on the next channel's first.
                    filled += min(4, length - 4 * g) * width;
                    if (filled >= 32) {
                        store_shared(at, pending);
                        at += 4;
                        pending = (u32)(bits >> 32);
                        filled -= 32;
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (4 * g + i >= length) break;
                        const int byte = __byte_perm(mine[g], 0, 0x4440 + i);
                        int value;
                        if (g == 0 && i == 0) value = byte - first_base;
                        else value = byte - (int)__byte_perm(mine[i ? g : g - (g > 0)], 0, 0x4440 + (i ? i - 1 : 3));
                        const u64 bits = (u64)zigzag(value) << filled;
                        pending |= (u32)bits;
                        filled += width;
                        if (filled >= 32) {
                            store_shared(at, pending);
                            at += 4;
                            pending = (u32)(bits >> 32);
                            filled -= 32;
                        }
                    }
                }
            }
            if (filled) {
                store_shared(at, pending);
                at += 4;
            }
        }
    }
    __syncwarp();
    return true;
}
