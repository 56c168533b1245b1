/* Folds the tensors of a packed checkpoint into a model. */
#pragma once

#include "engine.h"
#include "model.h"

namespace binaryvit {

/*
 * The model of a config and its tensors, for these kernels. Returns null and sets `problem` if a tensor is missing or
 * its size does not fit the config.
 */
std::unique_ptr<Model> fold(const binaryvit_config &config, const binaryvit_tensor *tensors, int num_tensors,
                            const Kernels &kernels, std::string &problem);

}  // namespace binaryvit
