"""llama.cpp by llama-cpp-python's low-level functions, for what llama-bench does not measure:
`model` is a GGUF file. The cache is float16 (or Q8_0) and flash attention is on, as in its own
tools.
"""

import ctypes
import random
import struct
import time
from argparse import Namespace

import llama_cpp as lib
from serve import serve

UNIT = 64  # positions that are computed; `deep` repeats their keys and values


class LlamaCpp:
    def __init__(self, arguments: Namespace):
        random.seed(0)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(str(arguments.model).encode(), params)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.threads = arguments.threads
        self.bytes = lib.llama_model_size(self.model)

    def decode(self, prompt: int, tokens: int) -> dict:
        return self.batch(prompt, tokens, 1)

    def batch(self, prompt: int, tokens: int, rows: int) -> dict:
        context = self._context(rows * (prompt + tokens + 1), rows)
        for position in range(prompt):
            self._feed(context, position, rows)
        answer = self._steps(context, prompt, tokens, rows)
        lib.llama_free(context)
        return answer

    def deep(self, depth: int, tokens: int) -> dict:
        """Decode after `depth` positions, a few computed ones again and again."""
        return self._deep(depth, tokens, lib.GGML_TYPE_F16)

    def deep_int8(self, depth: int, tokens: int) -> dict:
        return self._deep(depth, tokens, lib.GGML_TYPE_Q8_0)

    def _deep(self, depth: int, tokens: int, cache_type: int) -> dict:
        context = self._context(depth + tokens + UNIT, 1, cache_type)
        for position in range(UNIT):
            self._feed(context, position, 1)
        size = lib.llama_state_seq_get_size(context, 0)
        state = (ctypes.c_uint8 * size)()
        lib.llama_state_seq_get_data(context, state, size, 0)
        longer = repeat_cells(bytes(state), depth // UNIT)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = ctypes.cast(longer, ctypes.POINTER(ctypes.c_uint8))
        if not lib.llama_state_seq_set_data(context, start, len(longer), 0):
            raise RuntimeError("llama.cpp does not take the longer state")
        answer = self._steps(context, depth // UNIT * UNIT, tokens, 1)
        lib.llama_free(context)
        return answer | {"bytes": answer["bytes"] + len(longer) * tokens}

    def answer(self, prompt: int, tokens: int) -> dict:
        """A prompt at once, then one token after the other, each the likeliest."""
        context = self._context(prompt + tokens + 1, 1)
        ids = (lib.llama_token * prompt)(*(self._id() for _ in range(prompt)))
        start = time.perf_counter()
        batch = lib.llama_batch_get_one(ids, prompt)
        for _ in range(tokens):
            self._check(lib.llama_decode(context, batch))
            logits = lib.llama_get_logits_ith(context, -1)
            best = _argmax(logits, self.vocabulary)
            batch = lib.llama_batch_get_one((lib.llama_token * 1)(best), 1)
        seconds = time.perf_counter() - start
        lib.llama_free(context)
        return {"seconds": seconds, "tokens": tokens}

    def _context(self, size: int, sequences: int, cache_type: int = lib.GGML_TYPE_F16):
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = size + 256 * sequences, sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = cache_type
        return lib.llama_init_from_model(self.model, params)

    def _steps(self, context, position: int, tokens: int, rows: int) -> dict:
        self._feed(context, position, rows)
        start = time.perf_counter()
        for step in range(1, tokens + 1):
            self._feed(context, position + step, rows)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens * rows, "bytes": self.bytes * tokens}

    def _feed(self, context, position: int, sequences: int) -> None:
        """A random token for each sequence, with its logits."""
        batch = lib.llama_batch_init(sequences, 0, 1)
        batch.n_tokens = sequences
        for i in range(sequences):
            batch.token[i], batch.pos[i] = self._id(), position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i, True
        self._check(lib.llama_decode(context, batch))
        lib.llama_get_logits(context)  # waits
        lib.llama_batch_free(batch)

    def _id(self) -> int:
        return random.randrange(self.vocabulary // 2)

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def repeat_cells(state: bytes, times: int) -> bytes:
    """A sequence's state with its cells several times, one after the other.

    The state is int32 magic, sequence, streams (1), cells; a cell's position, number of sequences
    (1) and sequence; then int32 transposed (0), layers; then for each layer's keys, then for each
    layer's values, int32 type, uint64 bytes of a row, rows.
    """
    magic, sequence, streams, cells = struct.unpack_from("<4i", state)
    at = 16 + 12 * cells
    transposed, layers = struct.unpack_from("<2i", state, at)
    if streams != 1 or transposed:
        raise RuntimeError("the state of this llama.cpp has another form")
    parts = [struct.pack("<4i", magic, sequence, 1, cells * times)]
    parts += [struct.pack("<3i", position, 1, sequence) for position in range(cells * times)]
    parts.append(state[at : at + 8])
    at += 8
    for _ in range(2 * layers):
        (row,) = struct.unpack_from("<q", state, at + 4)
        end = at + 12 + row * cells
        parts += [state[at : at + 12], state[at + 12 : end] * times]
        at = end
    if at != len(state):
        raise RuntimeError("the state of this llama.cpp has another form")
    return b"".join(parts)


def _argmax(values, count: int) -> int:
    import numpy as np

    return int(np.ctypeslib.as_array(values, (count,)).argmax())


def load(arguments: Namespace) -> tuple[dict, dict]:
    engine = LlamaCpp(arguments)
    actions = {
        name: getattr(engine, name) for name in ("decode", "batch", "answer", "deep", "deep_int8")
    }
    return {"version": f"llama-cpp-python {lib.__version__}"}, actions


if __name__ == "__main__":
    serve(load)
