# The interpreter's torch as the target `torch_stable`: the headers of the stable ABI and the three
# libraries it needs. Caffe2's CMake config is not used: with a CUDA build of torch it aborts if
# there is no CUDA toolkit.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "from importlib.util import find_spec; from pathlib import Path; \
print(Path(find_spec('torch').origin).parent.as_posix())"
  OUTPUT_VARIABLE torch_root
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE torch_missing
  ERROR_QUIET)
if(torch_missing)
  message(FATAL_ERROR
    "torch is not installed for ${Python_EXECUTABLE}: install torch >= 2.11 first")
endif()
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_root}/include)
# The module runs on every torch >= 2.11.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
set(suffix ${CMAKE_SHARED_LIBRARY_SUFFIX})
foreach(library torch torch_cpu c10)
  target_link_libraries(torch_stable INTERFACE ${torch_root}/lib/lib${library}${suffix})
endforeach()
