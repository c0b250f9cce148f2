// space 1 320 256
// buffer b0 : f32 scalar in
// buffer b1 : u8 element inout
// buffer b2 : f32 group inout
// buffer b3 : f32 scalar in
// buffer b4 : f32 element in
// buffer b5 : f32 scalar in
// buffer b6 : f32 scalar in
// buffer b7 : u8 element inout
// buffer b8 : f32 group inout
// buffer b9 : f32 scalar in
// buffer b10 : i64 scalar in
// buffer b11 : f32 scalar in
// buffer b12 : f32 scalar in
// buffer b13 : f32 scalar in
// buffer b14 : bool scalar in
// buffer b15 : f32 element out
// %0 = load b0 : f32 scalar
// %1 = load b1 : i32 element
// %2 = load b2 : f32 group
// %3 = load b3 : f32 scalar
// %4 = load b4 : f32 element
// %5 = load b5 : f32 scalar
// %6 = load b6 : f32 scalar
// %7 = load b7 : i32 element
// %8 = load b8 : f32 group
// %9 = load b9 : f32 scalar
// %10 = load b10 : i64 scalar
// %11 = load b11 : f32 scalar
// %12 = load b12 : f32 scalar
// %13 = load b13 : f32 scalar
// %14 = load b14 : bool scalar
// %15 = dynamic8_value %1 unsigned : f32 element
// %16 = mul %15 %2 : f32 element
// %17 = mul %16 %16 : f32 element
// %18 = mul %0 %17 : f32 element
// %19 = mul %3 %4 : f32 element
// %20 = mul %19 %4 : f32 element
// %21 = add %18 %20 : f32 element
// %22 = sqrt %21 : f32 element
// %23 = dynamic8_value %7 signed : f32 element
// %24 = mul %23 %8 : f32 element
// %25 = mul %6 %24 : f32 element
// %26 = mul %9 %4 : f32 element
// %27 = add %25 %26 : f32 element
// %28 = abs %27 : f32 element
// %29 = mul %5 %28 : f32 element
// %30 = maximum %22 %29 : f32 element
// %31 = constant i64:1 : i64 scalar
// %32 = add %10 %31 : i64 scalar
// %33 = f32 %32 : f32 scalar
// %34 = mul %33 %11 : f32 scalar
// %35 = expm1 %34 : f32 scalar
// %36 = neg %35 : f32 scalar
// %37 = sqrt %36 : f32 scalar
// %38 = constant 1 : f32 scalar
// %39 = div %38 %37 : f32 scalar
// %40 = mul %30 %39 : f32 element
// %41 = add %40 %12 : f32 element
// %42 = constant 0 : f32 scalar
// %43 = eq %41 %42 : bool element
// %44 = mul %33 %13 : f32 scalar
// %45 = expm1 %44 : f32 scalar
// %46 = neg %45 : f32 scalar
// %47 = div %38 %46 : f32 scalar
// %48 = mul %27 %47 : f32 element
// %49 = div %48 %41 : f32 element
// %50 = where %43 %42 %49 : f32 element
// %51 = group_max %28 : f32 group
// %52 = gt %51 %42 : bool group
// %53 = where %52 %51 %38 : f32 group
// %54 = dynamic8_code %27 %53 signed : i32 element
// %55 = where %14 %54 %7 : i32 element
// %56 = where %14 %51 %8 : f32 group
// %57 = abs %30 : f32 element
// %58 = group_max %57 : f32 group
// %59 = gt %58 %42 : bool group
// %60 = where %59 %58 %38 : f32 group
// %61 = dynamic8_code %30 %60 unsigned : i32 element
// %62 = constant i32:1 : i32 scalar
// %63 = maximum %61 %62 : i32 element
// %64 = where %14 %63 %1 : i32 element
// %65 = where %14 %58 %2 : f32 group
// store b15 %50
// store b7 %55
// store b8 %56
// store b1 %64
// store b2 %65
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

static inline float load_bf16(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

// to nearest, ties to even; NaN stays NaN
static inline uint16_t store_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

static inline int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float float_of(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}


// bitsandbytes' dynamic 8-bit map: values of codes, and codes of values over their block's divisor. Bit for bit what
// kernels/dynamic8.py expands the two operations to, where the arithmetic is explained. Of values and codes there must
// be room for whole runs of 64.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#include <immintrin.h>
// A decade's constants lie in a register and are taken by an exponent. The expansion compares six times and selects
// twelve times, and comparisons have one port: a step of 8-bit Adam took 3.9 ns an element, and takes 2.2 here.
static inline __m512i dynamic8_load(const uint8_t* codes, __mmask16 inside) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, codes));
}

static inline __m512i dynamic8_load(const int32_t* codes, __mmask16 inside) {
    return _mm512_maskz_loadu_epi32(inside, codes);
}

template <bool is_signed, typename Code>
static inline void dynamic8_values(const Code* codes, int64_t count, float* values) {
    // By how many zeros lead the entry's number, modulo 16: of 0, of the decades from the last to the first, and before
    // those of the largest entry, which is -0.8 * -1.25 = 1.
    const __m512 inverse = is_signed
        ? _mm512_setr_ps(2, 0, 0, 0, 0, 0, 0, 0, 0, 0x1p-6f, 0x1p-5f, 0x1p-4f, 0x1p-3f, 0x1p-2f, 0x1p-1f, 1)
        : _mm512_setr_ps(0, 0, 0, 0, 0, 0, 0, 0, 0x1p-7f, 0x1p-6f, 0x1p-5f, 0x1p-4f, 0x1p-3f, 0x1p-2f, 0x1p-1f, 1);
    const __m512 power = is_signed
        ? _mm512_setr_ps(0, 0, 0, 0, 0, 0, 0, 0, -1.25f, 1, 1e-1f, 1e-2f, 1e-3f, 1e-4f, 1e-5f, 1e-6f)
        : _mm512_setr_ps(0, 0, 0, 0, 0, 0, 0, -1.25f, 1, 1e-1f, 1e-2f, 1e-3f, 1e-4f, 1e-5f, 1e-6f, 0);
    for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 inside = count - j < 16 ? (1u << (count - j)) - 1 : 0xffff;
        const __m512i code = dynamic8_load(codes + j, inside);
        const __m512i entry = _mm512_add_epi32(code, _mm512_set1_epi32(is_signed ? -127 : 1));
        const __m512i size = is_signed ? _mm512_abs_epi32(entry) : entry;
        const __m512i zeros = _mm512_lzcnt_epi32(size);
        __m512 value = _mm512_add_ps(_mm512_cvtepi32_ps(size), _mm512_set1_ps(0.5f));
        value = _mm512_mul_ps(value, _mm512_set1_ps(0.9f));
        // fused, yet not another number: a product with a power of two is exact
        value = _mm512_fmsub_ps(value, _mm512_permutexvar_ps(zeros, inverse), _mm512_set1_ps(0.8f));
        value = _mm512_mul_ps(value, _mm512_permutexvar_ps(zeros, power));
        if (is_signed) {  // 0xf8: a or (b and c)
            const __m512i sign = _mm512_set1_epi32(INT32_MIN);
            value = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value), entry, sign, 0xf8));
        }
        _mm512_storeu_ps(values + j, value);
    }
}

// An entry is nearest where its position rounds to it, save at three seams, which are moved into the choice of the
// decade: what lies below a decade's seam is the largest entry of the decade below. Then 0 is a decade of one entry, so
// is 1.0, and in every binade there is at most one edge.
struct Dynamic8Decades {
    int32_t offset[32];  // by a float's exponent modulo 32: added to the float's bits, those of its decade's width
    constexpr explicit Dynamic8Decades(bool is_signed) : offset() {
        // the least float of each decade, found by encoding all floats
        constexpr int32_t edges[2][9] = {
            {0x342e7ba1, 0x35c29d9c, 0x374d8549, 0x38e94edd, 0x3a8a71d5, 0x3c2872aa, 0x3dcfae04, 0x3f7f8cca, 0},
            {0x3493a3b2, 0x35ff037a, 0x37734503, 0x3900734e, 0x3a91d14a, 0x3c2d0e4b, 0x3dd28f54, 0x3f7f1999, 0}};
        int32_t decade = 0;
        for (int32_t exponent = 104; exponent < 128; ++exponent) {
            const int32_t edge = edges[is_signed][decade];
            const bool here = edge >> 23 == exponent;
            decade += here;
            offset[exponent % 32] = ((decade + (is_signed ? 126 : 127)) << 23) - (here ? edge : exponent << 23);
        }
    }
};

template <bool is_signed>
static inline void dynamic8_codes(const float* values, float divisor, int64_t count, uint8_t* codes) {
    static constexpr Dynamic8Decades decades(is_signed);
    const __m512i lower = _mm512_loadu_si512(decades.offset), upper = _mm512_loadu_si512(decades.offset + 16);
    // By the width's exponent, modulo 16; for 1.0, whatever makes positions round to it.
    const __m512 power = is_signed
        ? _mm512_setr_ps(1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1, 0.103f, 0, 0, 0, 0, 0, 0, 0, 1e7f, 1e6f)
        : _mm512_setr_ps(1e6f, 1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1, 0.103f, 0, 0, 0, 0, 0, 0, 0, 1e7f);
    // of bytes that were packed from four registers within lanes
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i sign = _mm512_set1_epi32(INT32_MIN), exponent = _mm512_set1_epi32(0x7f800000);
    const __m512 one = _mm512_set1_ps(1), divisors = _mm512_set1_ps(divisor), inverse = _mm512_div_ps(one, divisors);
    // Where no remainder underflows, but for quotients below the first edge.
    const bool corrected = divisor > 0x1p-75f && divisor < 0x1p100f;
    // Four vectors side by side: each is a chain of 25 operations, of which the scheduler holds too few (0.3 ns an
    // element of 8-bit Adam).
    for (int64_t j = 0; j < count; j += 64) {
        __m512 unit[4], size[4], width[4];
        __m512i decade[4], code[4];
        for (int k = 0; k < 4; ++k) unit[k] = _mm512_loadu_ps(values + j + 16 * k);
        if (corrected) {
            // Markstein's: a product with the nearest inverse, twice corrected by its remainder, is the quotient to
            // nearest. Seven operations; a division holds the divider for as long as twenty take. Not of what is beyond
            // the divisor, infinities above all; of two, the second is taken where one is NaN.
            __m512 bounded[4], rest[4];
            for (int k = 0; k < 4; ++k) bounded[k] = _mm512_min_ps(divisors, unit[k]);
            for (int k = 0; k < 4; ++k) bounded[k] = _mm512_max_ps(-divisors, bounded[k]);
            for (int k = 0; k < 4; ++k) unit[k] = _mm512_mul_ps(bounded[k], inverse);
            for (int k = 0; k < 4; ++k) rest[k] = _mm512_fnmadd_ps(unit[k], divisors, bounded[k]);
            for (int k = 0; k < 4; ++k) unit[k] = _mm512_fmadd_ps(rest[k], inverse, unit[k]);
            for (int k = 0; k < 4; ++k) rest[k] = _mm512_fnmadd_ps(unit[k], divisors, bounded[k]);
            for (int k = 0; k < 4; ++k) unit[k] = _mm512_fmadd_ps(rest[k], inverse, unit[k]);
        } else {
            for (int k = 0; k < 4; ++k) unit[k] = _mm512_div_ps(unit[k], divisors);
        }
        // NaN becomes 2^-21, which has the entry that the expansion gives it: the one next to 0
        for (int k = 0; k < 4; ++k)
            unit[k] = _mm512_fixupimm_ps(_mm512_set1_ps(0x1p-21f), unit[k], _mm512_set1_epi32(0x11111100), 0);
        for (int k = 0; k < 4; ++k) size[k] = _mm512_range_ps(unit[k], one, 0xa);  // the lesser in size, without a sign
        for (int k = 0; k < 4; ++k) size[k] = _mm512_max_ps(size[k], _mm512_set1_ps(0x1p-23f));
        for (int k = 0; k < 4; ++k) decade[k] = _mm512_srli_epi32(_mm512_castps_si512(size[k]), 23);
        for (int k = 0; k < 4; ++k) decade[k] = _mm512_permutex2var_epi32(lower, decade[k], upper);
        for (int k = 0; k < 4; ++k) decade[k] = _mm512_add_epi32(decade[k], _mm512_castps_si512(size[k]));
        for (int k = 0; k < 4; ++k) width[k] = _mm512_castsi512_ps(_mm512_and_si512(decade[k], exponent));
        for (int k = 0; k < 4; ++k) decade[k] = _mm512_srli_epi32(decade[k], 23);
        for (int k = 0; k < 4; ++k) size[k] = _mm512_mul_ps(size[k], _mm512_permutexvar_ps(decade[k], power));
        for (int k = 0; k < 4; ++k) size[k] = _mm512_add_ps(size[k], _mm512_set1_ps(0.8f));
        for (int k = 0; k < 4; ++k) size[k] = _mm512_mul_ps(size[k], _mm512_set1_ps(static_cast<float>(1 / 0.9)));
        for (int k = 0; k < 4; ++k) size[k] = _mm512_fmsub_ps(size[k], width[k], _mm512_set1_ps(0.5f));
        for (int k = 0; k < 4; ++k) width[k] = _mm512_fmsub_ps(width[k], _mm512_set1_ps(2), one);
        for (int k = 0; k < 4; ++k) code[k] = _mm512_castps_si512(_mm512_min_ps(size[k], width[k]));
        if (is_signed)
            for (int k = 0; k < 4; ++k)
                code[k] = _mm512_ternarylogic_epi32(code[k], _mm512_castps_si512(unit[k]), sign, 0xf8);
        for (int k = 0; k < 4; ++k) code[k] = _mm512_cvtps_epi32(_mm512_castsi512_ps(code[k]));
        for (int k = 0; k < 4; ++k) code[k] = _mm512_add_epi32(code[k], _mm512_set1_epi32(is_signed ? 127 : -1));
        // saturated: -1.0 has no entry, and the code of the one next to it
        const __m512i low = _mm512_packs_epi32(code[0], code[1]), high = _mm512_packs_epi32(code[2], code[3]);
        _mm512_storeu_si512(codes + j, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
    }
}
#else
template <bool is_signed, typename Code>
static inline void dynamic8_values(const Code* codes, int64_t count, float* values) {
    constexpr float first = is_signed ? 1 : 2;
    #pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const float code = static_cast<float>(codes[j]), entry = is_signed ? code - 127.0f : code + 1.0f;
        const float size = std::abs(entry);
        float power = 1e-6f, inverse = 1 / first;
        power = size >= 2 * first ? 1e-5f : power, inverse = size >= 2 * first ? 0.5f / first : inverse;
        power = size >= 4 * first ? 1e-4f : power, inverse = size >= 4 * first ? 0.25f / first : inverse;
        power = size >= 8 * first ? 1e-3f : power, inverse = size >= 8 * first ? 0.125f / first : inverse;
        power = size >= 16 * first ? 1e-2f : power, inverse = size >= 16 * first ? 0x1p-4f / first : inverse;
        power = size >= 32 * first ? 1e-1f : power, inverse = size >= 32 * first ? 0x1p-5f / first : inverse;
        power = size >= 64 * first ? 1.0f : power, inverse = size >= 64 * first ? 0x1p-6f / first : inverse;
        float value = ((size + 0.5f) * 0.9f * inverse - 0.8f) * power;
        value = size >= 128 * first ? 1.0f : value;
        value = size < first ? 0.0f : value;
        values[j] = entry < 0.0f ? -value : value;
    }
}

template <bool is_signed>
static inline void dynamic8_codes(const float* values, float divisor, int64_t count, uint8_t* codes) {
    constexpr float first = is_signed ? 1 : 2, to_zero = is_signed ? 0.5 - 0.175 / 0.9 : 0.5 - 0.125 / 0.9;
    #pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const float unit = values[j] / divisor, absolute = std::abs(unit);
        const float size = !(absolute >= 1.0f) ? absolute : 1.0f;
        float power = 1e6f, width = first;
        power = size > 1e-6f ? 1e5f : power, width = size > 1e-6f ? 2 * first : width;
        power = size > 1e-5f ? 1e4f : power, width = size > 1e-5f ? 4 * first : width;
        power = size > 1e-4f ? 1e3f : power, width = size > 1e-4f ? 8 * first : width;
        power = size > 1e-3f ? 1e2f : power, width = size > 1e-3f ? 16 * first : width;
        power = size > 1e-2f ? 1e1f : power, width = size > 1e-2f ? 32 * first : width;
        power = size > 1e-1f ? 1.0f : power, width = size > 1e-1f ? 64 * first : width;
        const float position = (size * power + 0.8f) * static_cast<float>(1 / 0.9) * width - 0.5f;
        const float seam = width - (size > 1e-6f ? 0.3f : to_zero), nearest = std::rint(position);
        const float most = 2 * width - 1, atleast = nearest > width ? nearest : width;
        const float inside = atleast < most ? atleast : most;
        float entry = position < seam ? width - 1 : inside;
        // an edge of the last decade alone, whose positions are the highest
        entry = position >= 128 * first - 0.75f ? 128 * first : entry;
        if (is_signed) {
            const float below = 127.0f - (entry < 127.0f ? entry : 127.0f);
            codes[j] = static_cast<uint8_t>(unit < 0.0f ? below : entry + 127.0f);
        } else {
            codes[j] = static_cast<uint8_t>(entry - 1);
        }
    }
}
#endif

extern "C" void run(void** buffers, const int64_t* pitches, const int64_t* numbers,
                    int64_t row_0, int64_t row_1, int64_t group_0, int64_t group_1) {
    const float* at_b0 = static_cast<const float*>(buffers[0]);
    uint8_t* at_b1 = static_cast<uint8_t*>(buffers[1]);
    const int64_t pitch_b1 = pitches[1];
    float* at_b2 = static_cast<float*>(buffers[2]);
    const float* at_b3 = static_cast<const float*>(buffers[3]);
    const float* at_b4 = static_cast<const float*>(buffers[4]);
    const int64_t pitch_b4 = pitches[4];
    const float* at_b5 = static_cast<const float*>(buffers[5]);
    const float* at_b6 = static_cast<const float*>(buffers[6]);
    uint8_t* at_b7 = static_cast<uint8_t*>(buffers[7]);
    const int64_t pitch_b7 = pitches[7];
    float* at_b8 = static_cast<float*>(buffers[8]);
    const float* at_b9 = static_cast<const float*>(buffers[9]);
    const int64_t* at_b10 = static_cast<const int64_t*>(buffers[10]);
    const float* at_b11 = static_cast<const float*>(buffers[11]);
    const float* at_b12 = static_cast<const float*>(buffers[12]);
    const float* at_b13 = static_cast<const float*>(buffers[13]);
    const bool* at_b14 = static_cast<const bool*>(buffers[14]);
    float* at_b15 = static_cast<float*>(buffers[15]);
    const int64_t pitch_b15 = pitches[15];
    const float v0 = static_cast<float>(at_b0[0]);
    const float v3 = static_cast<float>(at_b3[0]);
    const float v5 = static_cast<float>(at_b5[0]);
    const float v6 = static_cast<float>(at_b6[0]);
    const float v9 = static_cast<float>(at_b9[0]);
    const int64_t v10 = static_cast<int64_t>(at_b10[0]);
    const float v11 = static_cast<float>(at_b11[0]);
    const float v12 = static_cast<float>(at_b12[0]);
    const float v13 = static_cast<float>(at_b13[0]);
    const bool v14 = at_b14[0];
    const int64_t v31 = int64_t(1);
    const int64_t v32 = static_cast<int64_t>(static_cast<uint64_t>(v10) + static_cast<uint64_t>(v31));
    const float v33 = static_cast<float>(v32);
    const float v34 = v33 * v11;
    const float v35 = std::expm1(v34);
    const float v36 = -v35;
    const float v37 = std::sqrt(v36);
    const float v38 = static_cast<float>(0x1.0000000000000p+0);
    const float v39 = v38 / v37;
    const float v42 = static_cast<float>(0x0.0p+0);
    const float v44 = v33 * v13;
    const float v45 = std::expm1(v44);
    const float v46 = -v45;
    const float v47 = v38 / v46;
    const int32_t v62 = int32_t(1);
    const int64_t groups = group_1 - group_0, columns = 320;
    #pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < (row_1 - row_0) * groups; ++task) {
        const int64_t row = row_0 + task / groups, group = group_0 + task % groups;
        const int64_t first = group * 256;
        const int64_t length = columns - first < 256 ? columns - first
                                                     : 256;
        float kept_27[256];
        float kept_30[256];
        float given_15[256];
        float given_23[256];
        uint8_t given_54[256];
        uint8_t given_61[256];
        dynamic8_values<false>(at_b1 + row * pitch_b1 + first, length, given_15);
        dynamic8_values<true>(at_b7 + row * pitch_b7 + first, length, given_23);
        const float v2 = static_cast<float>(at_b2[row * 2 + group]);
        const float v8 = static_cast<float>(at_b8[row * 2 + group]);
        int32_t r51 = 0;
        int32_t r58 = 0;
        #pragma omp simd reduction(max: r51) reduction(max: r58)
        for (int64_t j = 0; j < length; ++j) {
            const float v4 = static_cast<float>(at_b4[row * pitch_b4 + first + j]);
            const float v15 = static_cast<float>(given_15[j]);
            const float v16 = v15 * v2;
            const float v17 = v16 * v16;
            const float v18 = v0 * v17;
            const float v19 = v3 * v4;
            const float v20 = v19 * v4;
            const float v21 = v18 + v20;
            const float v22 = std::sqrt(v21);
            const float v23 = static_cast<float>(given_23[j]);
            const float v24 = v23 * v8;
            const float v25 = v6 * v24;
            const float v26 = v9 * v4;
            const float v27 = v25 + v26;
            kept_27[j] = v27;
            const float v28 = std::abs(v27);
            const float v29 = v5 * v28;
            const float v30 = v22 != v22 ? v22 : (v22 > v29 ? v22 : v29);
            kept_30[j] = v30;
            const float v40 = v30 * v39;
            const float v41 = v40 + v12;
            const bool v43 = v41 == v42;
            const float v48 = v27 * v47;
            const float v49 = v48 / v41;
            const float v50 = v43 ? v42 : v49;
            const float v57 = std::abs(v30);
            r51 = bits_of(v28) > r51 ? bits_of(v28) : r51;
            r58 = bits_of(v57) > r58 ? bits_of(v57) : r58;
            at_b15[row * pitch_b15 + first + j] = v50;
        }
        const float v51 = float_of(r51);
        const bool v52 = v51 > v42;
        const float v53 = v52 ? v51 : v38;
        const float v56 = v14 ? v51 : v8;
        const float v58 = float_of(r58);
        const bool v59 = v58 > v42;
        const float v60 = v59 ? v58 : v38;
        const float v65 = v14 ? v58 : v2;
        dynamic8_codes<true>(kept_27, v53, length, given_54);
        dynamic8_codes<false>(kept_30, v60, length, given_61);
        #pragma omp simd
        for (int64_t j = 0; j < length; ++j) {
            const int32_t v1 = static_cast<int32_t>(at_b1[row * pitch_b1 + first + j]);
            const int32_t v7 = static_cast<int32_t>(at_b7[row * pitch_b7 + first + j]);
            const int32_t v54 = static_cast<int32_t>(given_54[j]);
            const int32_t v55 = (v54 & -static_cast<int32_t>(v14)) | (v7 & (static_cast<int32_t>(v14) - 1));
            const int32_t v61 = static_cast<int32_t>(given_61[j]);
            const int32_t v63 = !(v61 <= v62) ? v61 : v62;
            const int32_t v64 = (v63 & -static_cast<int32_t>(v14)) | (v1 & (static_cast<int32_t>(v14) - 1));
            at_b7[row * pitch_b7 + first + j] = static_cast<uint8_t>(v55);
            at_b1[row * pitch_b1 + first + j] = static_cast<uint8_t>(v64);
        }
        at_b8[row * 2 + group] = v56;
        at_b2[row * 2 + group] = v65;
    }
}
