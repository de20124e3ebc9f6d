#pragma once

#include "ops/kernels.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

void plan(const PlanArgs& args);
void advance(const AdvanceArgs& args);
void rotate(const RotateArgs& args);
void append(const AppendArgs& args);
void compress(const CompressArgs& args);
void choose(const CompressArgs& args);  // compress for kMostUsed
void attend(const AttendArgs& args);
void spans_forward(const SpansArgs& args);
void spans_backward(const SpansBackwardArgs& args);

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
