# Every source file of the project, listed: a new file is one line here.

set(CTX_SOURCES
    csrc/core/archive.cpp
    csrc/core/attention.cpp
    csrc/core/attention_calls.cpp
    csrc/core/attention_module.cpp
    csrc/core/attention_options.cpp
    csrc/core/checksum.cpp
    csrc/core/compressor.cpp
    csrc/core/files.cpp
    csrc/core/huge_pages.cpp
    csrc/core/init.cpp
    csrc/core/json.cpp
    csrc/core/memory.cpp
    csrc/core/memory_rows.cpp
    csrc/core/memory_spec.cpp
    csrc/core/model_memory.cpp
    csrc/core/module_call.cpp
    csrc/core/module_check.cpp
    csrc/core/module_parts.cpp
    csrc/core/rows.cpp
    csrc/core/rows_check.cpp
    csrc/core/rows_resize.cpp
    csrc/core/safetensors.cpp
    csrc/core/schedule.cpp
    csrc/core/session.cpp
    csrc/core/session_streams.cpp
    csrc/core/settings.cpp
    csrc/core/slots.cpp
    csrc/core/snapshot.cpp
    csrc/core/state_pickle.cpp
    csrc/core/transformer.cpp
    csrc/core/transformer_block.cpp
    csrc/core/transformer_config.cpp
    csrc/core/weights.cpp
    csrc/kernels/cpu/capability.cpp
    csrc/ops/attend.cpp
    csrc/ops/attend_autograd.cpp
    csrc/ops/attend_composite.cpp
    csrc/ops/attend_kernels.cpp
    csrc/ops/composite.cpp
    csrc/ops/composite_backward.cpp
    csrc/ops/compress.cpp
    csrc/ops/derivatives.cpp
    csrc/ops/enlarged.cpp
    csrc/ops/groups.cpp
    csrc/ops/groups_composite.cpp
    csrc/ops/groups_cpu.cpp
    csrc/ops/memory.cpp
    csrc/ops/plan.cpp
    csrc/ops/reader.cpp
    csrc/ops/registry.cpp
    csrc/ops/relative.cpp
    csrc/ops/rotary.cpp
    csrc/ops/rows.cpp
    csrc/ops/settings.cpp
    csrc/ops/shapes.cpp
    csrc/ops/spans.cpp
    csrc/ops/state.cpp
    csrc/ops/step.cpp
    csrc/ops/writer.cpp)

# Compiled once for each instruction set.
set(CTX_CPU_KERNEL_SOURCES
    csrc/kernels/cpu/append.cpp
    csrc/kernels/cpu/attend.cpp
    csrc/kernels/cpu/choose.cpp
    csrc/kernels/cpu/compress.cpp
    csrc/kernels/cpu/plan.cpp
    csrc/kernels/cpu/rotary.cpp
    csrc/kernels/cpu/spans_backward.cpp
    csrc/kernels/cpu/spans_forward.cpp
    csrc/kernels/cpu/table.cpp)

set(CTX_CUDA_SOURCES
    csrc/kernels/cuda/register.cpp
    csrc/kernels/cuda/attend.cu
    csrc/kernels/cuda/attend_core_bfloat16.cu
    csrc/kernels/cuda/attend_core_float16.cu
    csrc/kernels/cuda/attend_core_float32.cu
    csrc/kernels/cuda/attend_core_float64.cu
    csrc/kernels/cuda/attend_mma_bfloat16.cu
    csrc/kernels/cuda/attend_mma_float16.cu
    csrc/kernels/cuda/plan.cu
    csrc/kernels/cuda/rotary.cu
    csrc/kernels/cuda/runtime.cu
    csrc/kernels/cuda/spans_backward.cu
    csrc/kernels/cuda/spans_forward.cu
    csrc/kernels/cuda/table.cu
    csrc/kernels/cuda/write.cu)

set(CTX_PYTHON_SOURCES csrc/bindings/module.cpp csrc/bindings/session.cpp csrc/bindings/snapshot.cpp)

# These include kernels, whose pragmas the compiler would warn of.
set(CTX_KERNEL_TEST_SOURCES tests/cpp/test_kernels.cpp tests/cpp/test_kernels_spans.cpp)
set_source_files_properties(${CTX_KERNEL_TEST_SOURCES} PROPERTIES COMPILE_OPTIONS -fopenmp-simd)

# One program each, named after the file.
set(CTX_TEST_SOURCES ${CTX_KERNEL_TEST_SOURCES} tests/cpp/soak_session.cpp
                     tests/cpp/test_attention.cpp tests/cpp/test_memory.cpp
                     tests/cpp/test_modules.cpp tests/cpp/test_rows.cpp
                     tests/cpp/test_schedule.cpp tests/cpp/test_session.cpp
                     tests/cpp/test_snapshot.cpp tests/cpp/test_weights.cpp)

set(CTX_PRECOMPILED_HEADERS <ATen/ATen.h> <torch/csrc/autograd/custom_function.h>
                            <torch/library.h>)
