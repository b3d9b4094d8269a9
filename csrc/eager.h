// The fast path of eager steps: what torchlars._C has for torchlars/step.py and torchlars/optim/sgd.py, besides the
// ops.
#pragma once

#include <pybind11/pybind11.h>

namespace torchlars {

void bind_fast_path(pybind11::module_& m);

}  // namespace torchlars
