# libtorchops_cuda.so: the kernels of csrc/cuda for the compute capabilities TORCHOPS_CUDA_ARCHS.
#
# The CUDA runtime is linked statically. Torch's own symbols (its allocator, its current stream) come
# from the torch that is running when the library is loaded, which is why the torch that this was
# built against may well be a CPU-only one: libtorch.so is named as a dependency, and what it lacks
# stays undefined until then.
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake before 3.26
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()

# Machine code only, no PTX: a GPU that is not listed gets an error that names what was built.
set(cuda_archs)
foreach(arch IN LISTS TORCHOPS_CUDA_ARCHS)
  list(APPEND cuda_archs "${arch}-real")
endforeach()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/sm90/*.cu)
add_library(torchops_cuda SHARED ${cuda_sources})
set_target_properties(torchops_cuda PROPERTIES
  CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_RUNTIME_LIBRARY Static
  CUDA_ARCHITECTURES "${cuda_archs}" BUILD_RPATH "$ORIGIN" INSTALL_RPATH "$ORIGIN"
  BUILD_WITH_INSTALL_RPATH ON)
target_include_directories(torchops_cuda PRIVATE csrc)
target_include_directories(torchops_cuda SYSTEM PRIVATE ${TORCHOPS_TORCH_ROOT}/include)
target_compile_definitions(torchops_cuda PRIVATE
  TORCHOPS_CUDA_LIBRARY TORCHOPS_CUDA_ARCHS="${cuda_arch_names}")
# The report of registers and spills is kept beside each object, for tests/test_cuda_compile.py.
set_target_properties(torchops_cuda PROPERTIES
  RULE_LAUNCH_COMPILE "sh ${CMAKE_CURRENT_SOURCE_DIR}/cmake/keep_report.sh <OBJECT>")
target_compile_options(torchops_cuda PRIVATE -Xptxas=-v)
target_link_directories(torchops_cuda PRIVATE ${TORCHOPS_TORCH_ROOT}/lib)
target_link_libraries(torchops_cuda PRIVATE torchops)
target_link_options(torchops_cuda PRIVATE -Wl,--no-as-needed -ltorch -Wl,--as-needed)
