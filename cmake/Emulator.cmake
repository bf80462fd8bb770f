# The CUDA kernels, compiled for the CPU with the emulator: a library for tests alone, which
# replaces the CPU kernels of mllama's operators when it is loaded. `make test-emulated` builds it.
set(emulator_sources source stack regions checker callbacks scheduler collectives matrix switches)
list(TRANSFORM emulator_sources REPLACE "(.+)" "csrc/emulator/\\1.cpp")
list(TRANSFORM MLLAMA_CUDA_OPS REPLACE "(.+)" "csrc/ops/\\1_cuda.cpp" OUTPUT_VARIABLE host_sources)
list(TRANSFORM MLLAMA_CUDA_OPS REPLACE "(.+)" "csrc/kernels/cuda/\\1.cu"
    OUTPUT_VARIABLE cuda_sources)
list(APPEND cuda_sources tests/cuda/planted.cu)
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX)

# Errors name files of the sources.
set(paths -ffile-prefix-map=../../= -ffile-prefix-map=${CMAKE_BINARY_DIR}=${CMAKE_SOURCE_DIR})
set(options -g1 -Wall -Wextra -Wno-psabi ${paths})
# Instrumented objects come last: of inline functions that several objects have, the linker keeps
# the first, and the checker must not watch itself. The functions that -fsanitize=thread calls are
# the emulator's, not libtsan's.
add_library(emulated_kernels OBJECT ${cuda_sources})
target_include_directories(emulated_kernels PRIVATE csrc)
target_compile_options(emulated_kernels PRIVATE -x c++ -O1 ${options} -fno-strict-aliasing
    -fsanitize=thread)
add_library(mllama_emulated MODULE ${emulator_sources} ${host_sources}
    $<TARGET_OBJECTS:emulated_kernels>)
target_include_directories(mllama_emulated PRIVATE csrc)
list(JOIN MLLAMA_CUDA_OPS " " cuda_op_words)
target_compile_definitions(mllama_emulated PRIVATE MLLAMA_EMULATED
    MLLAMA_CUDA_OPS="${cuda_op_words}")
target_compile_options(mllama_emulated PRIVATE -O2 ${options})
target_link_libraries(mllama_emulated PRIVATE torch_stable ${CMAKE_DL_LIBS})
