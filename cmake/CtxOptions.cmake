# Options, compiler flags, instruction sets, and whether CUDA is on.

set(CTX_CUDA "AUTO" CACHE STRING "CUDA kernels: AUTO (when toolkit and torch allow it), ON, OFF")
set_property(CACHE CTX_CUDA PROPERTY STRINGS AUTO ON OFF)
set(CTX_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined (ON means these two)")
option(CTX_WERROR "Treat warnings as errors" OFF)
option(CTX_PCH "Precompile torch's headers" ON)
# What is built once, as a wheel is, need not be rebuilt file by file.
option(CTX_UNITY "Compile the library's sources (not the kernels) as two units" OFF)
option(CTX_BUILD_PYTHON "Build the Python module" ${PROJECT_IS_TOP_LEVEL})
option(CTX_BUILD_TESTS "Build the C++ tests" OFF)

if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_CXX_SCAN_FOR_MODULES OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(APPLE)
  set(CTX_ORIGIN "@loader_path")
else()
  set(CTX_ORIGIN "$ORIGIN")
endif()

# Flags of our own targets; never exported.
add_library(ctx_build_flags INTERFACE)
set(cxx_only "$<COMPILE_LANGUAGE:CXX>")
target_compile_options(ctx_build_flags INTERFACE "$<${cxx_only}:-Wall;-Wextra;-Wshadow>")
if(CTX_WERROR)
  target_compile_options(ctx_build_flags INTERFACE "$<${cxx_only}:-Werror>")
endif()
if(CTX_SANITIZE)
  if(CTX_SANITIZE STREQUAL "ON")
    set(CTX_SANITIZE "address,undefined")
  endif()
  target_compile_options(ctx_build_flags INTERFACE "$<${cxx_only}:-fsanitize=${CTX_SANITIZE}>"
                                                   "$<${cxx_only}:-fno-omit-frame-pointer>")
  target_link_options(ctx_build_flags INTERFACE "-fsanitize=${CTX_SANITIZE}")
endif()

# Instruction sets, the portable one first.
set(CTX_CPU_KERNEL_FLAGS -O3 -fopenmp-simd -fno-math-errno -ffp-contract=fast)
set(CTX_CPU_CAPABILITIES DEFAULT)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND CTX_CPU_CAPABILITIES AVX2 AVX512)
  set(CTX_CPU_FLAGS_AVX2 -mavx2 -mfma -mf16c)
  set(CTX_CPU_FLAGS_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq ${CTX_CPU_FLAGS_AVX2})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC's own header: _mm512_undefined_ps() is what its name says (GCC bug 105593).
    list(APPEND CTX_CPU_FLAGS_AVX512 -Wno-maybe-uninitialized)
  endif()
endif()

# ATen/Parallel.h runs serially in files that are compiled without OpenMP. The run-time library must
# be the one that torch carries: with a second one, torch.set_num_threads would not reach us.
macro(ctx_configure_openmp)
  find_package(OpenMP QUIET COMPONENTS CXX)
  if(OpenMP_CXX_FOUND)
    file(GLOB ctx_openmp "${CTX_TORCH_ROOT}/lib/libgomp*.so*"
         "${CTX_TORCH_ROOT}/../torch.libs/libgomp*.so*")
    if(NOT ctx_openmp)
      set(ctx_openmp ${OpenMP_CXX_LIBRARIES})
    endif()
    target_compile_options(ctx_build_flags INTERFACE "$<${cxx_only}:${OpenMP_CXX_FLAGS}>")
    target_link_libraries(ctx_build_flags INTERFACE ${ctx_openmp})
  else()
    message(STATUS "ctx: OpenMP not found, kernels run on one thread")
  endif()
endmacro()

# Decides on CUDA from toolkit, torch and option, never from the presence of a GPU (images are
# built on machines without one), and says so in one line. Sets CTX_WITH_CUDA.
macro(ctx_configure_cuda)
  set(CTX_WITH_CUDA OFF)
  set(CTX_CUDA_TOOLKIT "")
  set(ctx_no_cuda "")
  string(TOUPPER "${CTX_CUDA}" ctx_cuda_mode)
  if(ctx_cuda_mode STREQUAL "OFF")
    set(ctx_no_cuda "CTX_CUDA=OFF")
  elseif(NOT CTX_TORCH_CUDA)
    set(ctx_no_cuda "torch ${CTX_TORCH_VERSION} has none")
  else()
    include(CheckLanguage)
    set(CMAKE_MESSAGE_LOG_LEVEL WARNING)
    check_language(CUDA)
    find_package(CUDAToolkit QUIET)
    unset(CMAKE_MESSAGE_LOG_LEVEL)
    if(NOT CMAKE_CUDA_COMPILER OR NOT CUDAToolkit_FOUND)
      set(ctx_no_cuda "no toolkit")
    elseif(NOT CUDAToolkit_VERSION_MAJOR EQUAL CTX_TORCH_CUDA_MAJOR)
      set(ctx_no_cuda
          "toolkit ${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}, torch wants CUDA ${CTX_TORCH_CUDA}"
      )
    endif()
  endif()

  if(ctx_no_cuda AND ctx_cuda_mode STREQUAL "ON")
    message(FATAL_ERROR "ctx: CTX_CUDA=ON, but CUDA cannot be used: ${ctx_no_cuda}")
  elseif(ctx_no_cuda)
    message(STATUS "ctx: CUDA off (${ctx_no_cuda})")
  else()
    set(CTX_CUDA_TOOLKIT "${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}")
    if(NOT CTX_CUDA_SOURCES)
      message(STATUS "ctx: CUDA toolkit ${CTX_CUDA_TOOLKIT} found, no CUDA sources yet")
    else()
      set(CTX_WITH_CUDA ON)
      ctx_cuda_architectures()
      enable_language(CUDA)
      set(CMAKE_CUDA_STANDARD 20)
      set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
      set(CTX_BUILD_CUDA "${CTX_CUDA_TOOLKIT}") # for _build_info.py
      string(REPLACE ";" " " CTX_BUILD_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
      set(CMAKE_CUDA_RUNTIME_LIBRARY Shared) # torch's own; a second copy would hold a second state
      ctx_add_torch_cuda()
      message(STATUS "ctx: CUDA on (toolkit ${CTX_CUDA_TOOLKIT}, "
                     "architectures ${CMAKE_CUDA_ARCHITECTURES})")
    endif()
  endif()
endmacro()

# CMAKE_CUDA_ARCHITECTURES from torch's TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else the current
# generations, the newest with PTX for those to come.
macro(ctx_cuda_architectures)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    if(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+[af]?(\\+PTX)?" ctx_archs "$ENV{TORCH_CUDA_ARCH_LIST}")
      set(CMAKE_CUDA_ARCHITECTURES)
      foreach(arch IN LISTS ctx_archs)
        string(REGEX REPLACE "\\.|\\+PTX" "" number "${arch}")
        if(arch MATCHES "PTX")
          list(APPEND CMAKE_CUDA_ARCHITECTURES ${number})
        else()
          list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-real)
        endif()
      endforeach()
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)
    endif()
  endif()
endmacro()
