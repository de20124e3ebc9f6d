#pragma once

#include "ops/kernels.h"

namespace ctx::cuda {

// All pointers are the device's; the table's name lists the architectures.
extern const Kernels kTable;

void plan(const PlanArgs& args);
void advance(const AdvanceArgs& args);
void rotate(const RotateArgs& args);
void write(const AppendArgs& pairs, const CompressArgs& groups);
void attend(const AttendArgs& args);
void spans_forward(const SpansArgs& args);
void spans_backward(const SpansBackwardArgs& args);

}  // namespace ctx::cuda
