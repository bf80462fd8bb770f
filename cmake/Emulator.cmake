# The CUDA kernels on the CPU: libraries for tests alone, which replace the CPU kernels of mllama's
# operators when they are loaded. `make test-emulated` builds mllama_emulated, from the kernels'
# sources; `make test-ptx` builds mllama_ptx_75 and mllama_ptx_80, from the PTX that nvcc makes.
list(TRANSFORM MLLAMA_CUDA_OPS REPLACE "(.+)" "csrc/ops/\\1_cuda.cpp" OUTPUT_VARIABLE host_sources)
list(TRANSFORM MLLAMA_CUDA_KERNELS REPLACE "(.+)" "csrc/kernels/cuda/\\1.cu"
    OUTPUT_VARIABLE cuda_sources)
list(APPEND cuda_sources tests/cuda/planted.cu)
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX)
set(emulator_sources source stack regions checker callbacks scheduler collectives matrix switches)
list(TRANSFORM emulator_sources REPLACE "(.+)" "csrc/emulator/\\1.cpp")

# Errors name files of the sources.
set(paths -ffile-prefix-map=../../= -ffile-prefix-map=${CMAKE_BINARY_DIR}=${CMAKE_SOURCE_DIR})
set(options -g1 -Wall -Wextra -Wno-psabi ${paths})

# Decoders are the library's own, since its decode_step is.
add_library(emulator OBJECT ${emulator_sources} ${host_sources} csrc/ops/decoders.cpp
    tests/cuda/planted.cpp)
target_include_directories(emulator PRIVATE csrc)
list(JOIN MLLAMA_CUDA_OPS " " cuda_op_words)
target_compile_definitions(emulator PRIVATE MLLAMA_EMULATED MLLAMA_CUDA_OPS="${cuda_op_words}")
target_compile_options(emulator PRIVATE -O2 ${options})
target_link_libraries(emulator PRIVATE torch_stable)

# The functions that -fsanitize=thread calls are the emulator's, not libtsan's.
add_library(emulated_kernels OBJECT ${cuda_sources})
target_include_directories(emulated_kernels PRIVATE csrc tests/cuda)
target_compile_options(emulated_kernels PRIVATE -x c++ -O1 ${options} -fno-strict-aliasing
    -fsanitize=thread)

# Instrumented objects come last: of inline functions that several objects have, the linker keeps
# the first, and the checker must not watch itself.
function(add_emulated_library name)
  add_library(${name} MODULE $<TARGET_OBJECTS:emulator> ${ARGN} $<TARGET_OBJECTS:emulated_kernels>)
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(${name} PRIVATE torch_stable ${CMAKE_DL_LIBS})
endfunction()
add_emulated_library(mllama_emulated)

find_program(MLLAMA_NVCC nvcc)
if(NOT MLLAMA_NVCC)
  return()
endif()
# A kernel from PTX has the symbol of the template in its source, which is weak. Those of attention
# are long, and others differ in a type that is converted alone: what matches these patterns is
# translated and stands for the rest, which runs from its source.
set(heads "Tiles<[^,]*, 64,|Tiles<mllama::f16,")  # every dtype, and every size with one of them
set(MLLAMA_PTX_attention "${heads}|merge_attention")
set(MLLAMA_PTX_attention_backward "${heads}|attention_deltas")
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/ptx)
foreach(architecture 75 80)
  set(translated "")
  foreach(source IN LISTS cuda_sources)
    cmake_path(GET source STEM stem)
    set(made ${CMAKE_BINARY_DIR}/ptx/${stem}_${architecture})
    add_custom_command(OUTPUT ${made}.cpp
      COMMAND ${MLLAMA_NVCC} -std=c++20 -O3 -lineinfo -arch=compute_${architecture} -ptx
              -I${CMAKE_SOURCE_DIR}/csrc -MD -MF ${made}.d -MT ${made}.cpp
              ${CMAKE_SOURCE_DIR}/${source} -o ${made}.ptx
      COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/scripts/ptx2cpp.py ${made}.ptx ${made}.cpp
              "${MLLAMA_PTX_${stem}}"
      DEPENDS ${source} scripts/ptx2cpp.py scripts/ptx_instructions.py DEPFILE ${made}.d VERBATIM)
    list(APPEND translated ${made}.cpp)
  endforeach()
  add_library(translated_${architecture} OBJECT ${translated})
  target_include_directories(translated_${architecture} PRIVATE csrc)
  target_compile_options(translated_${architecture} PRIVATE -O1 ${options} -Wno-unused-label
      -Wno-unused-variable -Wno-unused-but-set-variable -Wno-unused-parameter -ffp-contract=off -fwrapv -fno-strict-aliasing)
  add_emulated_library(mllama_ptx_${architecture} $<TARGET_OBJECTS:translated_${architecture}>)
endforeach()
