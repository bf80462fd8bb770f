"""llama.cpp's own quantizer by llama-cpp-python: `quantize.py IN OUT` writes a GGUF in Q4_0."""

import sys

import llama_cpp as lib

if __name__ == "__main__":
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_Q4_0, True
    status = lib.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params)
    sys.exit(status)
