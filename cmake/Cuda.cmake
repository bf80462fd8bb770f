# MLLAMA_CUDA: whether the module gets CUDA kernels. AUTO: where there are nvcc and a CUDA build of
# torch. ON: always, and nvcc is required; a CPU build of torch serves, since kernels include
# nothing of torch and link nothing of its CUDA libraries. OFF: no.
set(MLLAMA_CUDA AUTO CACHE STRING "Compile the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE MLLAMA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(MLLAMA_CUDA_OBJECTS "")  # what the module links
set(MLLAMA_CUDA_TOOLKIT "")  # its version
set(MLLAMA_CUDA_WORDS "")    # operators that have a kernel
set(wanted ${MLLAMA_CUDA})
if(MLLAMA_CUDA STREQUAL "AUTO")
  file(STRINGS ${torch_root}/version.py torch_cuda REGEX "^cuda.*= '[0-9.]+'")
  set(wanted OFF)
  if(torch_cuda)
    include(CheckLanguage)
    check_language(CUDA)
    set(wanted ${CMAKE_CUDA_COMPILER})
  endif()
endif()
if(NOT wanted)
  return()
endif()

# From the oldest architecture of CUDA 13 on; newer ones than 9.0 run the PTX.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(MLLAMA_CUDA_TOOLKIT ${CUDAToolkit_VERSION})
list(JOIN MLLAMA_CUDA_OPS " " MLLAMA_CUDA_WORDS)
list(TRANSFORM MLLAMA_CUDA_KERNELS REPLACE "(.+)" "csrc/kernels/cuda/\\1.cu" OUTPUT_VARIABLE sources)
add_library(cuda_kernels OBJECT ${sources})
target_include_directories(cuda_kernels PRIVATE csrc)
set_target_properties(cuda_kernels PROPERTIES CUDA_STANDARD 20 CUDA_RUNTIME_LIBRARY Static)
target_compile_options(cuda_kernels PRIVATE -Xptxas=-v
    "-Xcompiler=-Wall,-Wextra,-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}=.")

list(TRANSFORM MLLAMA_CUDA_OPS REPLACE "(.+)" "csrc/ops/\\1_cuda.cpp" OUTPUT_VARIABLE sources)
add_library(cuda_entries OBJECT ${sources})
target_include_directories(cuda_entries PRIVATE csrc)
target_compile_definitions(cuda_entries PRIVATE USE_CUDA)
target_compile_options(cuda_entries PRIVATE ${common_flags})
target_link_libraries(cuda_entries PRIVATE torch_stable CUDA::cudart_static)
set(MLLAMA_CUDA_OBJECTS $<TARGET_OBJECTS:cuda_kernels> $<TARGET_OBJECTS:cuda_entries>)
