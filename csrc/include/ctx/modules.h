// Modules: compressive attention and a language model over it, for training and streaming with
// LibTorch. Apart from ctx.h, since headers of torch::nn are large.
#pragma once

#include "ctx/attention_module.h"
#include "ctx/model_memory.h"
#include "ctx/transformer.h"
#include "ctx/weights.h"
