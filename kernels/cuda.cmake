# octavo_kernels._cuda: machine code for Hopper, PTX that newer and Ampere GPUs compile at load.
set(pypi_toolkit "${Python_SITELIB}/nvidia/cu13")
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(OCTAVO_NVCC nvcc HINTS "${pypi_toolkit}/bin" PATHS /usr/local/cuda/bin)
  if(NOT OCTAVO_NVCC)
    if(OCTAVO_CUDA STREQUAL "ON")
      message(FATAL_ERROR "OCTAVO_CUDA is ON, but no nvcc was found: install a CUDA 13 toolkit, or "
        "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime, or set CUDACXX")
    endif()
    message(STATUS "No nvcc was found: octavo_kernels._cuda is not built")
    return()
  endif()
  set(CMAKE_CUDA_COMPILER "${OCTAVO_NVCC}")
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "90a-real;80-virtual")
endif()
# PyPI's toolkit keeps its libraries in lib, where nvcc does not look.
if(CMAKE_CUDA_COMPILER STREQUAL "${pypi_toolkit}/bin/nvcc")
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${pypi_toolkit}/lib")
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}; CUDA 13.0 or newer "
    "is needed. Set CUDACXX to one, or OCTAVO_CUDA to OFF")
endif()

# One line for each area: its .cu and its bind_*.cpp.
pybind11_add_module(_cuda MODULE NO_EXTRAS
  csrc/cuda/module.cpp
  csrc/cuda/device.cu csrc/cuda/bind_device.cpp
  csrc/cuda/norm.cu csrc/cuda/elementwise.cu csrc/cuda/heads.cu csrc/cuda/cache.cu
  csrc/cuda/bind_elementwise.cpp
  csrc/cuda/decode_attention.cu csrc/cuda/decode_plan.cu csrc/cuda/bind_decode.cpp
  csrc/cuda/skinny_gemm.cu csrc/cuda/gated_gemm.cu csrc/cuda/bind_gemm.cpp
  csrc/cuda/upload.cpp csrc/cuda/bind_upload.cpp
  csrc/cuda/blaslt.cpp csrc/cuda/bind_blaslt.cpp
  csrc/cuda/moe.cu csrc/cuda/bind_moe.cpp
  csrc/cuda/persistent_layers.cu csrc/cuda/bind_persistent.cpp
  csrc/cuda/batch_state.cu csrc/cuda/bind_batch.cpp
  csrc/cuda/prefill_attention.cu csrc/cuda/prefill_warpgroup.cu csrc/cuda/bind_prefill.cpp
  csrc/cuda/sampling.cu csrc/cuda/penalties.cu csrc/cuda/logprobs.cu csrc/cuda/bind_sampling.cpp
)
target_include_directories(_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# The C++ here only passes arguments on: it compiles faster for less.
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-O1 -Wall -Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 --expt-relaxed-constexpr -Xcompiler=-Wall>)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
target_compile_definitions(_cuda PRIVATE OCTAVO_CUDA_ARCHITECTURES="${architectures}")
# The runtime is linked in: libcudart's place at run time is nobody's concern, and the driver's
# library is looked up by it when first needed, so that the module imports where there is none.
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
install(TARGETS _cuda LIBRARY DESTINATION octavo_kernels)
# A function that is nowhere is found when the module is loaded, not when it is linked.
add_custom_command(TARGET _cuda POST_BUILD COMMAND ${Python_EXECUTABLE} -c "import _cuda"
  WORKING_DIRECTORY $<TARGET_FILE_DIR:_cuda> VERBATIM)
