"""Mistakes that kernels could have, each as one change of their text: scripts/mutate_kernels.py
builds them, tests/cuda/test_mutants.py holds them against the sources.

Included are what the emulator exists for (barriers, fences, asynchronous copies, bounds, masks of
warps) and what only values can show. A change that alters nothing, such as a range that is wider
than need be, is no mistake and no mutant.
"""

from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc/kernels/cuda"


@dataclass(frozen=True)
class Mutant:
    kernel: str  # csrc/kernels/cuda/<kernel>.cu is what is compiled
    file: str
    mistake: str
    old: str  # found once in the file
    new: str

    def text(self) -> str:
        """The file's text with the mistake.

        Raises:
            ValueError: the old text is not there exactly once.
        """
        text = (SOURCES / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {count} times, not once")
        return text.replace(self.old, self.new)


# Kernel and file -> (mistake, old text, new text).
_TABLE = {
    ("rms_norm", "rms_norm.cuh"): [
        (
            "sum of squares in the dtype of x",
            "squares += v[j] * v[j];",
            "squares = rounded<T>(squares + v[j] * v[j]);",
        ),
        ("sum with the residual not rounded", "v[j] = rounded<T>(v[j] + w[j]);", "v[j] += w[j];"),
        ("normalized x not rounded", "rounded<T>(v[j] * rstd) * w[j]", "v[j] * rstd * w[j]"),
        ("gradient of the residual left out", "v[j] += u[j];", ";"),
    ],
    ("rms_norm", "rows.cuh"): [
        ("alignment ignored", "if (aligned && width", "if (width"),
        ("last rows dropped", "(rows + count - 1) / count", "rows / count"),
        ("no stride of the grid", "int64_t{gridDim.x} * kRows;", "int64_t{1} << 40;"),
    ],
    ("rms_norm", "device.cuh"): [
        (
            "barrier after partial sums dropped",
            "parts[threadIdx.x / 32] = v;\n    __syncthreads();",
            "parts[threadIdx.x / 32] = v;",
        ),
        (
            "first step of a warp's sum dropped",
            "(int step = 16; step; step /= 2) {\n        v = Combine",
            "(int step = 8; step; step /= 2) {\n        v = Combine",
        ),
    ],
    ("layer_norm", "layer_norm.cuh"): [
        ("sum in the dtype of x", "++j) sum += v[j];", "++j) sum = rounded<T>(sum + v[j]);"),
        ("mean of the gradient left out", "(v[j] - mean) * share - sum;", "(v[j] - mean) * share;"),
    ],
    ("layer_norm", "rows.cuh"): [
        ("an element too many", "i < width; i += kThreads * N", "i <= width; i += kThreads * N"),
        ("last part dropped", "part < parts; ++part", "part < parts - 1; ++part"),
    ],
    ("layer_norm", "device.cuh"): [
        ("barrier before partial sums dropped", "    __syncthreads();  // the last use", "    //")
    ],
    ("rope", "rope.cuh"): [
        ("one table for all of the batch", "a.sin + batch * a.sin_batch_stride +", "a.sin +"),
        ("queries' stride for keys", "(row * h.heads + head)", "(row * a.q.heads + head)"),
        ("backward turns forward", "s[j] * a.sign", "s[j]"),
    ],
    ("rope", "rope.cu"): [
        ("alignment of tokens ignored", "h.token_stride % vector == 0 &&\n", ""),
        ("alignment of tables ignored", "&& are_aligned(a.cos, a.sin)", ""),
    ],
    ("gated", "gated.cuh"): [
        ("cubic term's slope", "3.0f * 1.59576912f", "1.59576912f"),
        (
            "stride of gate for up",
            "+ row * a.up_stride + column);\n        MLLAMA_UNROLL for (int j = 0; j < N; ++j) x",
            "+ row * a.gate_stride + column);\n        MLLAMA_UNROLL for (int j = 0; j < N; ++j) x",
        ),
        ("no stride of the grid", "int64_t{gridDim.x} * kGatedThreads * N", "size"),
    ],
    ("gated", "gated.cu"): [
        (
            "alignment of rows ignored",
            'are_multiples(N, a.width, a.gate_stride, a.up_stride);\n        launch("gated"',
            'are_multiples(N, a.width);\n        launch("gated"',
        )
    ],
    ("patch_embed", "patch_embed.cuh"): [
        ("an element too many", "i < count * patch_size", "i <= count * patch_size"),
        ("patches transposed", "+ column * a.size + x;", "+ column * a.size + y;"),
    ],
    ("image", "image.cuh"): [
        ("not clamped above", "value > 255 ? 255 : value", "value"),
        ("more taps than there are", "k < a.count[place]", "k < a.most"),
    ],
    ("lora_linear", "lora_linear.cuh"): [
        ("barrier before tiles dropped", "        __syncthreads();  // the last use", "        //"),
        (
            "barrier after tiles dropped",
            "right(i, first + k); });\n        __syncthreads();",
            "right(i, first + k); });",
        ),
        (
            "factor's layouts exchanged",
            "a.by_column ? column * a.rank + c : c * a.width + column",
            "a.by_column ? c * a.width + column : column * a.rank + c",
        ),
        ("bound of ranks dropped", "row < a.rows && c < a.rank ?", "row < a.rows ?"),
        (
            "other layers' ranks forgotten",
            "a.small[row * a.stride + c] :",
            "a.small[row * a.rank + c] :",
        ),
        (
            "other layers' ranks written over",
            "a.small[(row + i) * a.stride + rank + j]",
            "a.small[(row + i) * a.rank + rank + j]",
        ),
        (
            "bound of columns dropped",
            "if (row >= a.rows || column >= a.width) return 0;",
            "if (row >= a.rows) return 0;",
        ),
        (
            "dropout left out of a gradient",
            "if (a.dropout && !KeepMask(a, seed, r)(c)) return;",
            "",
        ),
        (
            "half of the seed",
            "mix(static_cast<uint32_t>(row) ^ mix(low ^ mix(high)))",
            "mix(static_cast<uint32_t>(row) ^ mix(low))",
        ),
        (
            "result written over x",
            "from_float<T>(to_float(x) + a.scale * sum)",
            "from_float<T>(a.scale * sum)",
        ),
        ("no stride of the grid", "i += int64_t{gridDim.x} * kDotWarps", "i = a.rows * a.rank"),
    ],
    ("quantized_rows", "quantized_rows.cuh"): [
        ("codes past the row", "if (column < size) ", ""),
        ("tiny scales kept", "if (to_float(scale) < kSmallestScale) scale = bf16{0};", ""),
    ],
    ("select_token", "device.cuh"): [
        ("barrier between reductions dropped", "    __syncthreads();  // the last use", "    //"),
        (
            "barrier after partial results dropped",
            "= v;\n    __syncthreads();\n    v = parts[0];",
            "= v;\n    v = parts[0];",
        ),
    ],
    ("select_token", "select_token.cuh"): [
        (
            "barrier before scores change dropped",
            "__syncthreads();  // all have read x[likeliest]",
            "",
        ),
        (
            "barrier before the draw dropped",
            "double sum = 0;\n        __syncthreads();  // others have written the chunk\n",
            "double sum = 0;\n",
        ),
        (
            "barrier behind dropped tokens dropped",
            "before++ < count) x = 0;\n        });\n        __syncthreads();\n",
            "before++ < count) x = 0;\n        });\n",
        ),
        ("one token too few", "(a_.size - a_.top_k)", "(a_.size - a_.top_k + 1)"),
        ("decided scores forgotten", "own += more;", ";"),
        ("decided scores counted again", "key <= low ||", "key < low ||"),
        (
            "sums in float32",
            "double sum = 0;\n        __syncthreads();",
            "float sum = 0;\n        __syncthreads();",
        ),
        ("the likeliest dropped", "if (bits == 0x3f800000u && count >= all) count = all - 1;", ""),
        ("the last of equals", "static_cast<uint32_t>(~i);", "static_cast<uint32_t>(i);"),
        ("no stride of the grid", "row += gridDim.x", "row = rows"),
    ],
    ("packed_linear", "packed_linear.cuh"): [
        (
            "barrier between warps' sums dropped",
            "__syncthreads();\n    for (int i = threadIdx.x; i < R * kLanes",
            "for (int i = threadIdx.x; i < R * kLanes",
        ),
        ("barrier before the next copy dropped", "__syncthreads();  // before the next copy", "//"),
        ("late wait", "wait_for_copies<1>();", "wait_for_copies<2>();"),
        ("a row's bound dropped", "&& at < x.bytes;", ";"),
        ("rows past the last", "if (x >= a.rows) continue;", ""),
        (
            "columns past the last",
            "if (row >= a.rows || column >= a.out) return;",
            "if (row >= a.rows) return;",
        ),
        (
            "registers of A exchanged",
            "{group.word(q, row), group.word(q, row + 8), group.word(q + 4, row),",
            "{group.word(q, row), group.word(q + 4, row), group.word(q, row + 8),",
        ),
        ("NaN forgotten", "finite ? top / 127.0f : __uint_as_float(0x7fc00000u)", "top / 127.0f"),
        ("a warp's sum dropped", "w < kFewWarps; ++w", "w < kFewWarps - 1; ++w"),
        ("no upper bound of an index", "if (row < 0 || row >= a.out) trap", "if (row < 0) trap"),
    ],
    ("packed_linear", "packed_words.cuh"): [
        ("scale of the first half for both", "scales[half * kLanes + row]", "scales[row]"),
        ("header of the first span", "int64_t before = g / kSize.span;", "int64_t before = 0 * g;"),
    ],
    ("attention", "attention.cuh"): [
        (
            "barrier before the next tile of v dropped",
            "        __syncthreads();\n        fetch_keys(v_tile, v, key + kKeys);",
            "        fetch_keys(v_tile, v, key + kKeys);",
        ),
        (
            "barrier before the next tile of k dropped",
            "        __syncthreads();\n        fetch_keys(k_tile, k, key + kKeys);",
            "        fetch_keys(k_tile, k, key + kKeys);",
        ),
        (
            "late wait for k",
            "wait_for_copies<1>();\n        __syncthreads();\n        float scores",
            "wait_for_copies<2>();\n        __syncthreads();\n        float scores",
        ),
        (
            "late wait for v",
            "wait_for_copies<1>();\n        __syncthreads();\n        if (has_rows)",
            "wait_for_copies<2>();\n        __syncthreads();\n        if (has_rows)",
        ),
        (
            "barrier after the wait dropped",
            "wait_for_copies<1>();\n        __syncthreads();\n        float scores",
            "wait_for_copies<1>();\n        float scores",
        ),
        ("a key too many", "key < last[j / 2] && more", "key <= last[j / 2] && more"),
        (
            "mask left out where one row sees all",
            "smaller(last[0], last[1]);\n        bool plain",
            "larger(last[0], last[1]);\n        bool plain",
        ),
        (
            "keys' mask read past its end",
            "key + i < keys.last ? added_score(a, place.batch, key + i) : -kInfinity",
            "added_score(a, place.batch, key + i)",
        ),
        ("totals not rescaled", "        total[h] *= factor;\n", ""),
        (
            "wrong mask of a warp",
            "total[h] += __shfl_xor_sync(kAllLanes, total[h], 1);",
            "total[h] += __shfl_xor_sync(0xffffu, total[h], 1);",
        ),
        (
            "barrier between warps dropped",
            "                }\n            }\n            __syncthreads();\n",
            "                }\n            }\n",
        ),
        (
            "barrier after warps' statistics dropped",
            "        }\n        __syncthreads();\n        MLLAMA_UNROLL for",
            "        }\n        MLLAMA_UNROLL for",
        ),
        (
            "last tiles dropped",
            "(larger(tiles, 0) + a.parts - 1) / a.parts",
            "larger(tiles, 0) / a.parts",
        ),
        (
            "last rows dropped",
            "(a.rows + Shape::kRows - 1) / Shape::kRows",
            "a.rows / Shape::kRows",
        ),
    ],
    ("attention", "attention_visible.cuh"): [
        ("window of a key more", "- m.window + 1,", "- m.window,"),
        ("barrier between unions dropped", "    __syncthreads();  // the last use", "    //"),
        ("barrier after warps' ranges dropped", "= range;\n    __syncthreads();", "= range;"),
    ],
    ("attention", "attention_tiles.cuh"): [
        (
            "columns past the head",
            "d = i % kPieces * kPiece;\n                bool valid",
            "d = i % kPieces * kPiece;\n size = Tiles::kSize;\n bool valid",
        ),
        ("words of rows that are not aligned", "| size) % 4 == 0)", "| size) % 2 == 0)"),
        (
            "codes behind the row",
            "if (first + row < last && d < size)\n",
            "if (first + row < last)\n",
        ),
        (
            "matrices of B exchanged",
            "(lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;",
            "(lane % 8 + lane / 8 % 2 * 8) * kStride + lane / 16 * 8;",
        ),
        (
            "wrong lane",
            "__shfl_sync(kAllLanes, p[n][2 + k % 2], quad + k / 2)",
            "__shfl_sync(kAllLanes, p[n][2 + k % 2], quad + k % 4)",
        ),
    ],
    ("attention_backward", "attention_backward.cuh"): [
        (
            "barrier before the next tile dropped",
            "        __syncthreads();\n        fetch_other(0, from + kOther);",
            "        fetch_other(0, from + kOther);",
        ),
        (
            "barrier before the next second tile dropped",
            "            __syncthreads();\n        }\n        fetch_other(1",
            "        }\n        fetch_other(1",
        ),
        (
            "late wait",
            "wait_for_copies<0>();\n        __syncthreads();\n        const int column",
            "wait_for_copies<1>();\n        __syncthreads();\n        const int column",
        ),
        ("slope of the soft cap", "1 - capped * capped", "1 - capped"),
        (
            "last query left out",
            "mine = {smaller(mine.first, t), t + 1};",
            "mine = {smaller(mine.first, t), t};",
        ),
        ("queries past the last", "if (i >= a.batch * per_batch) return;", ""),
        (
            "columns past the head",
            "grad_k, h, a.size - column, a.scale",
            "grad_k, h, a.size, a.scale",
        ),
        ("keys past the last", "if (key >= a.keys) continue;", ""),
    ],
    ("decode", "decode.cuh"): [
        ("other half's sign", "x[d] * c + x[d - half] * s", "x[d] * c - x[d - half] * s"),
        ("values rotated", "a.kv_heads > 0 && place.kind != HeadPlace::value", "a.kv_heads > 0"),
        (
            "head written before all is read",
            "load_head(a, place, x);\n        __syncwarp();",
            "load_head(a, place, x);",
        ),
        (
            "position of another query",
            "position = *a.length + place.row % a.queries;",
            "position = *a.length + place.row / a.queries;",
        ),
        ("lanes past the head", "if (d < a.size) cached[d] =", "cached[d] ="),
        (
            "angle of an integer position",
            "2 * (turns - rint(turns))",
            "2 * (turns - rint(turns) + 0.25)",
        ),
        ("norm of k from q", "HeadPlace::key ? a.k_norm", "HeadPlace::key ? a.q_norm"),
        ("hidden images scaled", "!sees_image[i / width] ? 0 :", "!sees_image[i / width] ? x[i] :"),
    ],
    ("cross_entropy", "cross_entropy.cuh"): [
        ("own score of every thread", "if (i + j == target) own = x;", "own = x;"),
        ("sum without the highest", "sum += expf(x - top);", "sum += expf(x);"),
        ("gradient without its target", "if (counts && i + j == target) v[j]", "if (false) v[j]"),
        ("slope of the soft cap", "1.0f - t * t;", "1.0f - t;"),
        ("rows without a target kept", "if (!counts) v[j] = 0;", ";"),
        ("loss written by all", "if (threadIdx.x % team.kThreads == 0) a.losses", "a.losses"),
    ],
    ("cross_entropy", "device.cuh"): [
        (
            "barrier after the highest dropped",
            "parts[threadIdx.x / 32] = v;\n    __syncthreads();",
            "parts[threadIdx.x / 32] = v;",
        ),
        (
            "last warp's highest left out",
            "int i = 1; i < kWarps; ++i) v = Combine",
            "int i = 1; i < kWarps - 1; ++i) v = Combine",
        ),
    ],
}
MUTANTS = [
    Mutant(kernel, file, *change)
    for (kernel, file), changes in _TABLE.items()
    for change in changes
]
