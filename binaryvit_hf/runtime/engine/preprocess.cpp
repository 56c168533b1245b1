/*
 * From a picture to the input of a network (engine.h).
 *
 * Resizing is that of torchvision for 8-bit images on the CPU, bit for bit: a filter that widens when it shrinks the
 * picture, int16 weights, and rounding to 8 bits after each of its two passes, first along rows, then along columns.
 * PyTorch computes the same bits with and without AVX2 (ATEN_CPU_CAPABILITY=default). Exceptions without AVX2:
 *   - On x86, torchvision resizes bilinearly in float32.
 *   - PyTorch fills a result that is one pixel wide with copies of one pixel.
 * Fused multiply-adds change no weight: sides from 1 to 330 were tried.
 */
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

#include "engine.h"

namespace binaryvit {
namespace {

constexpr int kChannels = 3;
constexpr int kLanes = 16;  // numbers that one step of a loop computes
constexpr int kBilinear = 2, kBicubic = 3;
constexpr int64_t kMaxSide = 1 << 24;  // no product of two sides overflows

struct Size {
    int64_t height, width;
};

/* The size after resizing; sides below 1 mean that there is none. Rounds as transformers' image_transforms.py. */
Size resized_size(const binaryvit_image_processor &processor, Size picture) {
    if (processor.resample == 0) return picture;
    const double height = double(picture.height), width = double(picture.width);
    const bool tall = picture.width <= picture.height;
    if (processor.shortest_edge > 0) {
        double edge = processor.shortest_edge, exact = edge;
        if (processor.longest_edge > 0) {
            double least = std::min(height, width), most = std::max(height, width);
            if (most / least * edge > processor.longest_edge) {
                exact = processor.longest_edge * least / most;
                edge = std::rint(exact);
            }
        }
        Size size = {int64_t(tall ? exact * height / width : edge), int64_t(tall ? edge : exact * width / height)};
        // A picture whose shorter side fits already keeps its size, also where the rounded edge gives another one.
        return std::min(height, width) == edge ? picture : size;
    }
    if (processor.max_height > 0 && processor.max_width > 0) {
        double scale = std::min(processor.max_height / height, processor.max_width / width);
        return {int64_t(height * scale), int64_t(width * scale)};
    }
    return {processor.height, processor.width};
}

/* One side of a picture, on its way to the output. */
struct Side {
    Side(int64_t picture, int64_t resized, int32_t crop)
        : length(int(picture)), resized(int(resized)), output(crop > 0 ? crop : int(resized)) {
        kept = std::min(this->resized, output);
        first = (this->resized - kept) / 2;
        offset = (output - kept) / 2;
    }

    int length;   // of the picture
    int resized;  // length after resizing
    int output;   // length after cropping or padding
    int first;    // the first pixel of the resized side that is kept
    int kept;     // the number of its pixels that are kept
    int offset;   // where they begin in the output
};

double filter_weight(int resample, double distance) {
    double x = std::abs(distance);
    if (resample == kBilinear) return x < 1 ? 1 - x : 0;
    constexpr double a = -0.5;  // that of an antialiased bicubic filter; without antialiasing PyTorch uses -0.75
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}

/* An output is the sum of `count` inputs from `first` on, each times its weight. */
struct Taps {
    int first, count;
    size_t weights;  // index of the first weight
};

/* The taps of the kept pixels of a side. */
struct Filter {
    Filter(const Side &side, int resample) {
        const double scale = double(side.length) / side.resized;
        const double stretch = std::max(scale, 1.0), inverse = scale >= 1 ? 1 / scale : 1;
        const double support = (resample == kBilinear ? 1 : 2) * stretch;
        const int64_t most_taps = int64_t(std::ceil(float(support))) * 2 + 1;
        std::vector<double> row(static_cast<size_t>(most_taps)), kept;
        double largest = 0;  // of all pixels, also those that the crop leaves out
        for (int pixel = 0; pixel < side.resized; ++pixel) {
            const double center = scale * (pixel + 0.5);
            const int64_t first = std::max<int64_t>(int64_t(center - support + 0.5), 0);
            const int64_t end = std::min<int64_t>(int64_t(center + support + 0.5), side.length);
            const int count = int(std::min(std::max<int64_t>(end - first, 0), most_taps));
            double total = 0;
            for (int tap = 0; tap < count; ++tap) {
                row[size_t(tap)] = filter_weight(resample, (double(tap + first) - center + 0.5) * inverse);
                total += row[size_t(tap)];
            }
            for (int tap = 0; tap < count; ++tap) {
                row[size_t(tap)] /= total;
                largest = std::max(largest, row[size_t(tap)]);
            }
            if (pixel < side.first || pixel >= side.first + side.kept) continue;
            taps.push_back({int(first), count, kept.size()});
            kept.insert(kept.end(), row.begin(), row.begin() + count);
        }
        while (precision < 22 && int(0.5 + largest * (1 << (precision + 1))) < 1 << 15) ++precision;
        weights.reserve(kept.size());
        for (double weight : kept) {
            double scaled = weight * (1 << precision);
            weights.push_back(int16_t(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
        }
        for (Taps &of_pixel : taps) drop_zeros(of_pixel);
    }

    /* Leaves out zeros at both ends: a side that keeps its length has one tap a pixel. */
    void drop_zeros(Taps &of_pixel) const {
        const int16_t *weight = &weights[of_pixel.weights];
        while (of_pixel.count > 1 && weight[of_pixel.count - 1] == 0) --of_pixel.count;
        for (; of_pixel.count > 1 && *weight == 0; ++weight) {
            ++of_pixel.first;
            ++of_pixel.weights;
            --of_pixel.count;
        }
    }

    /* The inputs that the taps read. */
    int first() const {
        int first = taps.front().first;
        for (const Taps &of_pixel : taps) first = std::min(first, of_pixel.first);
        return first;
    }
    int end() const {
        int end = 0;
        for (const Taps &of_pixel : taps) end = std::max(end, of_pixel.first + of_pixel.count);
        return end;
    }

    int precision = 0;  // sums are divided by 2 ** precision
    std::vector<Taps> taps;
    std::vector<int16_t> weights;
};

/*
 * Filters kLanes neighbouring numbers.
 *
 * Args:
 *   lines: (count, kLanes), `stride` apart.
 *   weights: (count).
 *   filtered: written: (kLanes).
 */
#if defined(__SSE2__)
inline void filter_lanes(const uint8_t *lines, size_t stride, const int16_t *weights, int count, int precision,
                         uint8_t *filtered) {
    const __m128i zero = _mm_setzero_si128();
    __m128i sums[4];
    for (__m128i &sum : sums) sum = _mm_set1_epi32((1 << precision) >> 1);
    // One instruction multiplies two lines by their weights and adds the products.
    auto add = [&](__m128i first, __m128i second, __m128i pair) {
        const __m128i low = _mm_unpacklo_epi8(first, second), high = _mm_unpackhi_epi8(first, second);
        sums[0] = _mm_add_epi32(sums[0], _mm_madd_epi16(_mm_unpacklo_epi8(low, zero), pair));
        sums[1] = _mm_add_epi32(sums[1], _mm_madd_epi16(_mm_unpackhi_epi8(low, zero), pair));
        sums[2] = _mm_add_epi32(sums[2], _mm_madd_epi16(_mm_unpacklo_epi8(high, zero), pair));
        sums[3] = _mm_add_epi32(sums[3], _mm_madd_epi16(_mm_unpackhi_epi8(high, zero), pair));
    };
    auto load = [](const uint8_t *line) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(line)); };
    for (; count > 1; count -= 2, weights += 2, lines += 2 * stride) {
        int32_t pair;
        std::memcpy(&pair, weights, sizeof(pair));
        add(load(lines), load(lines + stride), _mm_set1_epi32(pair));
    }
    if (count == 1) add(load(lines), zero, _mm_set1_epi32(uint16_t(*weights)));
    for (__m128i &sum : sums) sum = _mm_sra_epi32(sum, _mm_cvtsi32_si128(precision));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(filtered),
                     _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3])));
}
#elif defined(__wasm_simd128__)
inline void filter_lanes(const uint8_t *lines, size_t stride, const int16_t *weights, int count, int precision,
                         uint8_t *filtered) {
    v128_t sums[4];
    for (v128_t &sum : sums) sum = wasm_i32x4_splat((1 << precision) >> 1);
    auto add = [&](v128_t first, v128_t second, v128_t pair) {
        const v128_t low = wasm_i8x16_shuffle(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const v128_t high =
            wasm_i8x16_shuffle(first, second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        sums[0] = wasm_i32x4_add(sums[0], wasm_i32x4_dot_i16x8(wasm_u16x8_extend_low_u8x16(low), pair));
        sums[1] = wasm_i32x4_add(sums[1], wasm_i32x4_dot_i16x8(wasm_u16x8_extend_high_u8x16(low), pair));
        sums[2] = wasm_i32x4_add(sums[2], wasm_i32x4_dot_i16x8(wasm_u16x8_extend_low_u8x16(high), pair));
        sums[3] = wasm_i32x4_add(sums[3], wasm_i32x4_dot_i16x8(wasm_u16x8_extend_high_u8x16(high), pair));
    };
    for (; count > 1; count -= 2, weights += 2, lines += 2 * stride)
        add(wasm_v128_load(lines), wasm_v128_load(lines + stride), wasm_v128_load32_splat(weights));
    if (count == 1) add(wasm_v128_load(lines), v128_t{}, wasm_i32x4_splat(uint16_t(*weights)));
    for (v128_t &sum : sums) sum = wasm_i32x4_shr(sum, uint32_t(precision));
    wasm_v128_store(filtered, wasm_u8x16_narrow_i16x8(wasm_i16x8_narrow_i32x4(sums[0], sums[1]),
                                                      wasm_i16x8_narrow_i32x4(sums[2], sums[3])));
}
#else
inline void filter_lanes(const uint8_t *lines, size_t stride, const int16_t *weights, int count, int precision,
                         uint8_t *filtered) {
    int32_t sums[kLanes];
    for (int32_t &sum : sums) sum = (1 << precision) >> 1;
    for (int tap = 0; tap < count; ++tap, lines += stride) {
        const int16_t weight = weights[tap];
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += weight * int16_t(lines[lane]);
    }
    for (int lane = 0; lane < kLanes; ++lane)
        filtered[lane] = uint8_t(std::min(std::max(sums[lane] >> precision, 0), 255));
}
#endif

/* Transposes kLanes x kLanes bytes: four times, the first half of the lines is interleaved with the second. */
inline void transpose(uint8_t *bytes) {
    uint8_t other[kLanes * kLanes];
    for (int turn = 0; turn < 4; ++turn) {
        const uint8_t *from = turn % 2 == 0 ? bytes : other;
        uint8_t *to = turn % 2 == 0 ? other : bytes;
        for (int i = 0; i < kLanes * kLanes / 2; ++i) {
            to[2 * i] = from[i];
            to[2 * i + 1] = from[i + kLanes * kLanes / 2];
        }
    }
}

size_t round_up(int number) { return size_t(number + kLanes - 1) / kLanes * kLanes; }

/* The rows that the vertical pass needs, filtered horizontally: (channels, rows, columns). */
class FilteredRows {
public:
    FilteredRows(const binaryvit_picture &picture, const Filter &columns, const Filter &rows)
        : first_row(rows.first()), num_rows(rows.end() - first_row), row_bytes(round_up(int(columns.taps.size()))),
          channel_bytes(row_bytes * round_up(num_rows)), bytes_(new uint8_t[channel_bytes * kChannels]),
          pixel_bytes_(picture.pixel_bytes), first_byte_(pixel_bytes_ * columns.first()),
          num_bytes_(pixel_bytes_ * (columns.end() - 1) + kChannels - first_byte_),
          lines_(new uint8_t[round_up(num_bytes_) * kLanes]) {
        for (int row = 0; row < num_rows; row += kLanes) {
            read(picture, row);
            filter(columns, row);
        }
    }

    /* The pixels of a row of the picture, and of those below it. */
    const uint8_t *row(int channel, int row) const {
        return &bytes_[channel * channel_bytes + size_t(row - first_row) * row_bytes];
    }

    const int first_row, num_rows;
    const size_t row_bytes, channel_bytes;

private:
    /* Transposes kLanes rows of the picture to lines: line `i` holds the `i`-th byte of each row. */
    void read(const binaryvit_picture &picture, int row) {
        for (int byte = 0; byte < num_bytes_; byte += kLanes) {
            uint8_t *tile = &lines_[size_t(byte) * kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                int64_t from = first_row + std::min(row + lane, num_rows - 1);
                const uint8_t *bytes = picture.pixels + from * picture.row_bytes + first_byte_ + byte;
                if (num_bytes_ - byte >= kLanes)
                    std::memcpy(tile + lane * kLanes, bytes, kLanes);
                else
                    std::memcpy(tile + lane * kLanes, bytes, size_t(num_bytes_ - byte));
            }
            transpose(tile);
        }
    }

    void filter(const Filter &columns, int row) {
        const int num_columns = int(columns.taps.size());
        for (int channel = 0; channel < kChannels; ++channel) {
            for (int column = 0; column < num_columns; column += kLanes) {
                alignas(kLanes) uint8_t tile[kLanes * kLanes];
                for (int lane = 0; lane < std::min(kLanes, num_columns - column); ++lane) {
                    const Taps &taps = columns.taps[size_t(column + lane)];
                    const size_t line = size_t(taps.first * pixel_bytes_ - first_byte_ + channel);
                    filter_lanes(&lines_[line * kLanes], size_t(pixel_bytes_) * kLanes, &columns.weights[taps.weights],
                                 taps.count, columns.precision, tile + lane * kLanes);
                }
                transpose(tile);
                uint8_t *to = &bytes_[channel * channel_bytes + size_t(row) * row_bytes + size_t(column)];
                for (int lane = 0; lane < kLanes; ++lane)
                    std::memcpy(to + lane * row_bytes, tile + lane * kLanes, kLanes);
            }
        }
    }

    std::unique_ptr<uint8_t[]> bytes_;
    const int pixel_bytes_, first_byte_, num_bytes_;  // of a row of the picture
    std::unique_ptr<uint8_t[]> lines_;
};

/* `pixel_values` of every 8-bit value of a channel. */
struct Values {
    /* Rounds as transformers' TorchvisionBackend, in float32. */
    Values(const binaryvit_image_processor &processor, int channel) {
        float mean = float(processor.mean[channel]), std = float(processor.std[channel]);
        if (processor.rescale) {
            mean *= float(1 / processor.rescale_factor);
            std *= float(1 / processor.rescale_factor);
        }
        for (int value = 0; value < 256; ++value) {
            of[value] = float(value);
            if (processor.normalize)
                of[value] = (of[value] - mean) / std;
            else if (processor.rescale)
                of[value] *= float(processor.rescale_factor);
        }
    }
    float of[256];
};

/* Writes the kept part of a channel: (height.output, width.output). The rest of it has the value `padding`. */
void write_channel(const FilteredRows &filtered, int channel, const Filter &rows, const Side &height,
                   const Side &width, const Values &values, float *output) {
    const size_t kept = size_t(width.kept), offset = size_t(width.offset), length = size_t(width.output);
    std::vector<uint8_t> bytes(round_up(width.kept));
    std::fill_n(output, size_t(height.offset) * length, values.of[0]);
    output += size_t(height.offset) * length;
    for (const Taps &taps : rows.taps) {
        for (size_t column = 0; column < kept; column += kLanes)
            filter_lanes(filtered.row(channel, taps.first) + column, filtered.row_bytes, &rows.weights[taps.weights],
                         taps.count, rows.precision, &bytes[column]);
        std::fill_n(output, offset, values.of[0]);
        for (size_t column = 0; column < kept; ++column) output[offset + column] = values.of[bytes[column]];
        std::fill_n(output + offset + kept, length - offset - kept, values.of[0]);
        output += length;
    }
    std::fill_n(output, size_t(height.output - height.offset - height.kept) * length, values.of[0]);
}

bool has_size(Size size) {
    return std::min(size.height, size.width) > 0 && std::max(size.height, size.width) <= kMaxSide;
}

bool valid(const binaryvit_image_processor &processor, Size picture) {
    for (int32_t number : {processor.shortest_edge, processor.longest_edge, processor.height, processor.width,
                           processor.max_height, processor.max_width, processor.crop_height, processor.crop_width})
        if (number < 0 || number > kMaxSide) return false;
    return (processor.resample == 0 || processor.resample == kBilinear || processor.resample == kBicubic) &&
           (processor.crop_height > 0) == (processor.crop_width > 0) && has_size(picture) &&
           has_size(resized_size(processor, picture));
}

}  // namespace
}  // namespace binaryvit

using namespace binaryvit;

extern "C" {

int32_t binaryvit_preprocessed_size(const binaryvit_image_processor *processor, int32_t picture_height,
                                    int32_t picture_width, int32_t *height, int32_t *width) {
    if (!valid(*processor, {picture_height, picture_width})) return 2;
    Size resized = resized_size(*processor, {picture_height, picture_width});
    *height = Side(picture_height, resized.height, processor->crop_height).output;
    *width = Side(picture_width, resized.width, processor->crop_width).output;
    return 0;
}

int32_t binaryvit_pixel_values(const binaryvit_image_processor *processor, const binaryvit_picture *picture,
                             float *pixel_values) try {
    const Size size = {picture->height, picture->width};
    if (!valid(*processor, size) || (picture->pixel_bytes != 3 && picture->pixel_bytes != 4)) return 2;
    const Size resized = resized_size(*processor, size);
    const Side height(size.height, resized.height, processor->crop_height);
    const Side width(size.width, resized.width, processor->crop_width);
    const Filter rows(height, processor->resample), columns(width, processor->resample);
    const FilteredRows filtered(*picture, columns, rows);
    for (int channel = 0; channel < kChannels; ++channel)
        write_channel(filtered, channel, rows, height, width, Values(*processor, channel),
                      pixel_values + size_t(channel) * height.output * width.output);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

}  // extern "C"
