# The interpreter's torch as the target `torch_stable`: headers of the stable ABI and the three libraries it needs.
# Caffe2's own CMake config is not used: on a CUDA build of torch it aborts where no CUDA toolkit is installed.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('torch').origin).parent.as_posix())"
  OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_missing ERROR_QUIET)
if(torch_missing)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: install torch >= 2.11 first")
endif()
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_root}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)  # runs on every torch >= 2.11
set(suffix ${CMAKE_SHARED_LIBRARY_SUFFIX})
foreach(library torch torch_cpu c10)
  target_link_libraries(torch_stable INTERFACE ${torch_root}/lib/lib${library}${suffix})
endforeach()
