# Imported targets for an installed torch, a Python package or a LibTorch archive alike.
#
# find_package(Torch) is not used: with a CUDA build of torch it stops where no CUDA toolkit is
# installed, though nothing of CUDA is needed to compile against torch's CPU side. This file is
# installed beside ctxConfig.cmake too.
#
#   ctx_find_torch(<minimum version>)
#     ctx::torch          headers, libtorch_cpu, libc10
#     ctx::torch_python   libtorch_python
#     CTX_TORCH_ROOT, CTX_TORCH_VERSION (2.14.1+cu130), CTX_TORCH_MINOR (2.14),
#     CTX_TORCH_CUDA (13.0, or empty), CTX_TORCH_CUDA_MAJOR
#   ctx_add_torch_cuda()
#     ctx::torch_cuda     libtorch_cuda, libc10_cuda and the CUDA run-time library
#
# Where it looks: CTX_TORCH_ROOT (variable, then environment), a Torch that the project has already
# found, Torch_DIR, CMAKE_PREFIX_PATH, the folder beside the installed ctx, then Python's.

macro(_ctx_try_torch path)
  if(NOT _ctx_torch_root AND NOT "${path}" STREQUAL "")
    foreach(_ctx_up "" "/../.." "/../../..")
      if(NOT _ctx_torch_root AND EXISTS "${path}${_ctx_up}/include/ATen/ATen.h")
        get_filename_component(_ctx_torch_root "${path}${_ctx_up}" ABSOLUTE)
      endif()
    endforeach()
  endif()
endmacro()

macro(ctx_find_torch minimum)
  set(_ctx_torch_root "")
  if(CTX_TORCH_ROOT)
    _ctx_try_torch("${CTX_TORCH_ROOT}")
    if(NOT _ctx_torch_root)
      message(FATAL_ERROR "ctx: CTX_TORCH_ROOT must be the folder of a torch package or LibTorch "
                          "(it has include/ and lib/), got ${CTX_TORCH_ROOT}")
    endif()
  endif()
  _ctx_try_torch("$ENV{CTX_TORCH_ROOT}")
  _ctx_try_torch("${TORCH_INSTALL_PREFIX}")
  _ctx_try_torch("${Torch_DIR}")
  foreach(_ctx_path IN LISTS CMAKE_PREFIX_PATH)
    _ctx_try_torch("${_ctx_path}")
  endforeach()
  string(REPLACE ":" ";" _ctx_paths "$ENV{CMAKE_PREFIX_PATH}")
  foreach(_ctx_path IN LISTS _ctx_paths)
    _ctx_try_torch("${_ctx_path}")
  endforeach()
  _ctx_try_torch("${_ctx_torch_hint}") # set by ctxConfig.cmake
  if(NOT _ctx_torch_root)
    foreach(_ctx_python "${Python_EXECUTABLE}" "${Python3_EXECUTABLE}" python3)
      if(NOT _ctx_torch_root AND _ctx_python)
        # Found without importing it: that takes seconds and may fail where compiling would not.
        execute_process(
          COMMAND "${_ctx_python}" -c
                  "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
          OUTPUT_VARIABLE _ctx_path
          OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
        _ctx_try_torch("${_ctx_path}")
      endif()
    endforeach()
  endif()
  if(NOT _ctx_torch_root)
    message(FATAL_ERROR "ctx: no torch found. Install it (pip install torch), or point "
                        "CTX_TORCH_ROOT at the folder of a torch package or LibTorch.")
  endif()
  set(CTX_TORCH_ROOT "${_ctx_torch_root}")
  _ctx_read_torch_version()
  if(CTX_TORCH_VERSION VERSION_LESS "${minimum}")
    message(FATAL_ERROR "ctx: torch must be ${minimum} or newer, got ${CTX_TORCH_VERSION} "
                        "at ${CTX_TORCH_ROOT}")
  endif()
  message(STATUS "ctx: building against torch ${CTX_TORCH_VERSION} at ${CTX_TORCH_ROOT}")
  _ctx_add_torch_targets()
endmacro()

# A package says its version in version.py; an archive in build-version.
macro(_ctx_read_torch_version)
  set(CTX_TORCH_CUDA "")
  if(EXISTS "${CTX_TORCH_ROOT}/version.py")
    file(READ "${CTX_TORCH_ROOT}/version.py" _ctx_text)
    string(REGEX MATCH "__version__ = '([^']+)'" _ctx_match "${_ctx_text}")
    set(CTX_TORCH_VERSION "${CMAKE_MATCH_1}")
    if(_ctx_text MATCHES "\ncuda[^=\n]*= '([0-9.]+)'")
      set(CTX_TORCH_CUDA "${CMAKE_MATCH_1}")
    endif()
  else()
    file(STRINGS "${CTX_TORCH_ROOT}/build-version" CTX_TORCH_VERSION LIMIT_COUNT 1)
    if(CTX_TORCH_VERSION MATCHES "\\+cu([0-9]+)([0-9])$")
      set(CTX_TORCH_CUDA "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    endif()
  endif()
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" CTX_TORCH_MINOR "${CTX_TORCH_VERSION}")
  string(REGEX MATCH "^[0-9]+" CTX_TORCH_CUDA_MAJOR "${CTX_TORCH_CUDA}")
endmacro()

function(_ctx_import_library target name)
  if(NOT TARGET ${target})
    set(file "${CTX_TORCH_ROOT}/lib/lib${name}${CMAKE_SHARED_LIBRARY_SUFFIX}")
    if(NOT EXISTS "${file}")
      message(FATAL_ERROR "ctx: torch must have ${file}, but it is missing")
    endif()
    add_library(${target} SHARED IMPORTED GLOBAL)
    set_target_properties(${target} PROPERTIES IMPORTED_LOCATION "${file}")
  endif()
endfunction()

function(_ctx_add_torch_targets)
  if(TARGET ctx::torch)
    return()
  endif()
  _ctx_import_library(ctx::torch_cpu torch_cpu)
  _ctx_import_library(ctx::c10 c10)
  add_library(ctx::torch INTERFACE IMPORTED GLOBAL)
  set_target_properties(
    ctx::torch
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
               "${CTX_TORCH_ROOT}/include;${CTX_TORCH_ROOT}/include/torch/csrc/api/include"
               INTERFACE_LINK_LIBRARIES "ctx::torch_cpu;ctx::c10"
               INTERFACE_COMPILE_FEATURES cxx_std_20)
  if(CTX_TORCH_CUDA AND NOT APPLE)
    # libtorch_cpu of a CUDA build needs libraries of the CUDA packages. It finds them itself when
    # it is loaded; the linker need not.
    set_target_properties(ctx::torch PROPERTIES INTERFACE_LINK_OPTIONS
                                                "LINKER:--allow-shlib-undefined")
  endif()
  if(EXISTS "${CTX_TORCH_ROOT}/lib/libtorch_python${CMAKE_SHARED_LIBRARY_SUFFIX}")
    _ctx_import_library(ctx::torch_python torch_python)
  endif()
endfunction()

function(ctx_add_torch_cuda)
  if(TARGET ctx::torch_cuda)
    return()
  endif()
  find_package(CUDAToolkit REQUIRED)
  _ctx_import_library(ctx::torch_cuda_kernels torch_cuda)
  _ctx_import_library(ctx::c10_cuda c10_cuda)
  # Headers of cuBLAS and the like, which ATen's CUDA headers include, come with torch's packages
  # where the toolkit is a small one.
  file(GLOB packaged "${CTX_TORCH_ROOT}/../nvidia/cu${CTX_TORCH_CUDA_MAJOR}/include")
  add_library(ctx::torch_cuda INTERFACE IMPORTED GLOBAL)
  set_target_properties(
    ctx::torch_cuda
    PROPERTIES INTERFACE_LINK_LIBRARIES
               "ctx::torch;ctx::torch_cuda_kernels;ctx::c10_cuda;CUDA::cudart"
               INTERFACE_INCLUDE_DIRECTORIES "${packaged}")
endfunction()
