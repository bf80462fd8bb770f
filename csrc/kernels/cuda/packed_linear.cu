#include "kernels/cuda/packed_linear.cuh"

namespace mllama::cuda {
namespace {

// From which on tiles of rows are worth their padding. What decodes has fewer, and a row of it the
// same bits beside any others.
constexpr int64_t kManyRows = 17;

unsigned parts(int64_t size, int64_t part) {
    return static_cast<unsigned>((size + part - 1) / part);
}

// Products of one format with the same x.
template <class Half, class T>
void launch_few(const PackedLinear* products, int count, Stream stream) {
    const PackedLinear& a = *products;
    int64_t bytes = kernels::block_bytes(a.packing, a.in);
    unsigned blocks = parts(a.out, kLanes);
    OtherProducts others{.count = count - 1, .at = {}};
    for (int i = 0; i < others.count; ++i) {
        const PackedLinear& other = products[i + 1];
        others.at[i] = {other.weight, other.bias, other.y, other.out};
        blocks += parts(other.out, kLanes);
    }
    auto run = [&](auto rows) {
        launch("multiply_few", &multiply_few<Half, T, rows>, dim3(blocks, parts(a.rows, rows)),
               32 * kFewWarps, 0, stream, a, others, bytes);
    };
    if (a.rows == 1) return run(std::integral_constant<int, 1>{});
    run(std::integral_constant<int, 4>{});
}

template <class Steps, class T>
void launch_many(const PackedLinear& a, const TileRows& x, Stream stream) {
    launch("multiply_many", &multiply_many<Steps, T>,
           dim3(parts(a.out, kLanes * kTileWarps), parts(a.rows, kTileRows)), kTileThreadCount, 0,
           stream, a, x, kernels::block_bytes(a.packing, a.in));
}

// Whether mma takes rows of x as they are: of the weights' type, in pieces of 16 bytes.
bool are_tiles(const PackedLinear& a) {
    bool same = (a.packing == Packing::bf16 && a.dtype == Dtype::bf16) ||
                (a.packing == Packing::f16 && a.dtype == Dtype::f16);
    return same && a.in % 8 == 0 && are_aligned(a.x);
}

void launch_few(const PackedLinear* products, int count, Stream stream) {
    dispatch(products->dtype, [&](auto t) {
        using T = decltype(t);
        dispatch_codes(products->packing,
                       [&](auto p) { launch_few<CodeHalf<p>, T>(products, count, stream); });
        dispatch_floats(products->packing, [&](auto w) {
            launch_few<FloatHalf<decltype(w), T>, T>(products, count, stream);
        });
    });
}

}  // namespace

void quantize_activations(const PackedLinear& a, Stream stream) {
    int64_t groups = chunk_count(a.in) * kChunkGroups;
    dispatch(a.dtype, [&](auto t) {
        launch("quantize_activations", &quantize_activations<decltype(t)>,
               blocks_for(a.rows * groups, kQuantizeWarps), 32 * kQuantizeWarps, 0, stream, a,
               groups);
    });
}

void packed_linear(const PackedLinear& a, Stream stream) {
    if (a.rows < kManyRows || architecture() < 80) return launch_few(&a, 1, stream);
    dispatch_codes(a.packing, [&](auto p) {
        int64_t stride = chunk_count(a.in) * kChunkInputs;
        const auto* codes = reinterpret_cast<const char*>(a.activations.codes);
        dispatch(a.dtype, [&](auto t) {
            launch_many<CodeSteps<p>, decltype(t)>(a, {codes, stride, stride}, stream);
        });
    });
    dispatch_floats(a.packing, [&](auto w) {
        using W = decltype(w);
        if constexpr (sizeof(W) == 2) {
            int64_t stride = a.in * 2;
            if (are_tiles(a))
                return launch_many<FloatSteps<W>, W>(
                    a, {static_cast<const char*>(a.x), stride, stride}, stream);
        }
        launch_few(&a, 1, stream);
    });
}

void packed_linears(const PackedLinear* products, int count, Stream stream) {
    for (int i = 0, alike; i < count; i += alike) {
        for (alike = 1; i + alike < count; ++alike) {
            if (products[i + alike].packing != products[i].packing) break;
        }
        launch_few(products + i, alike, stream);
    }
}

void unpack_weight(const kernels::PackWeight& a, const int64_t* rows, int64_t count,
                   Stream stream) {
    int64_t bytes = kernels::block_bytes(a.packing, a.in);
    dispatch(a.dtype, [&](auto t) {
        auto run = [&]<class Value>() {
            launch("unpack_weight", &unpack_weight<Value, decltype(t)>,
                   blocks_for(count * a.width, kUnpackThreads), kUnpackThreads, 0, stream, a, rows,
                   count, bytes);
        };
        dispatch_codes(a.packing, [&](auto p) { run.template operator()<CodeValue<p>>(); });
        dispatch_floats(a.packing,
                        [&](auto w) { run.template operator()<FloatValue<decltype(w)>>(); });
    });
}

}  // namespace mllama::cuda
