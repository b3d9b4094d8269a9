// The eager door: what torchlars._C offers to torchlars/lars.py and torchlars/optim/sgd.py beside the dispatcher.
#pragma once

#include <pybind11/pybind11.h>

namespace torchlars {

void bind_eager_door(pybind11::module_& m);

}  // namespace torchlars
