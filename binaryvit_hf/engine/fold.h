/* Checkpoint tensors to a folded model. */
#pragma once

#include "engine.h"
#include "model.h"

namespace binaryvit {

/*
 * Raises:
 *   std::runtime_error: a tensor is missing or has another size than the config says.
 */
std::unique_ptr<Model> fold(const binaryvit_config &config, const binaryvit_tensor *tensors, int num_tensors,
                            const Kernels &kernels);

}  // namespace binaryvit
