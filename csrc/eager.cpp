// The fast path of eager steps. In Python, a loop over parameters and the conversion of lists of tensors take more time
// per tensor than the arithmetic of a small layer. So the parameters of a group are gathered here, where reading .grad
// is reading a pointer.
//
// It takes plain layers only. Subclasses, sparse, complex, lazy and overlapping tensors, mixed dtypes and errors are
// left to the slow path in Python. Ops are called through the dispatcher, as from Python: the same kernels, and the
// reference on devices that have none.
#include "eager.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/flat_hash_map.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "copies.h"
#include "layers.h"

namespace torchlars {
namespace {

namespace py = pybind11;

using Tensors = std::vector<at::Tensor>;
using Numbers = std::vector<double>;

// Tensors that are kept alive by their Python objects. Owning references from C++ would take the GIL to be released,
// and several times as long.
class PyTensors {
 public:
  PyTensors() = default;
  PyTensors(const PyTensors&) = delete;
  PyTensors& operator=(const PyTensors&) = delete;
  ~PyTensors() {
    for (at::Tensor& tensor : tensors_) {
      Borrow::destroyBorrow(tensor);
    }
  }

  void add(PyObject* object) {
    tensors_.push_back(Borrow::createBorrow(THPVariable_Unpack(object)));
    objects_.append(py::handle(object));
  }

  // To be called after foreign code has run, which may have put other tensors into the Python objects.
  void read_again() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Borrow::assignBorrow(tensors_[i],
                           THPVariable_Unpack(PyList_GET_ITEM(objects_.ptr(), static_cast<Py_ssize_t>(i))));
    }
  }

  at::TensorList tensors() const { return tensors_; }
  const py::list& objects() const { return objects_; }

 private:
  using Borrow = c10::MaybeOwnedTraits<at::Tensor>;

  Tensors tensors_;
  py::list objects_;
};

// Whether kernels may read the memory of tensors as it is: no subclass, nothing lazy, no wrapper of a transformation.
class Plain {
 public:
  bool has(const at::Tensor& tensor) {
    if (tensor.key_set() != keys_) {  // of most tensors they are the same
      if (!has_plain_keys(tensor)) {
        return false;
      }
      keys_ = tensor.key_set();
    }
    return tensor.is_non_overlapping_and_dense() && tensor.has_storage() && has_memory(tensor);
  }

  // The storage of a tensor with the same dispatch keys as the last plain one; null of others.
  const c10::StorageImpl* storage_of(const c10::TensorImpl& tensor) const {
    const bool is_alike = tensor.key_set() == keys_ && tensor.has_storage();
    return is_alike ? tensor.unsafe_storage().unsafeGetStorageImpl() : nullptr;
  }

 private:
  // What dispatch keys decide: layout and is_inference() follow from them.
  static bool has_plain_keys(const at::Tensor& tensor) {
    static const auto harmless = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
    const auto rest = tensor.key_set() - harmless;
    return c10::toFunctionalityKey(rest.highestPriorityTypeId()) == c10::DispatchKey::Dense &&
           tensor.layout() == c10::kStrided && !tensor.is_inference();
  }

  c10::DispatchKeySet keys_;  // that were seen to be plain
};

// Whether there are more references than the known ones and the one that the Python object holds, if it exists.
template <typename Impl>
bool has_more_uses(const Impl* impl, size_t uses, size_t known) {
  return uses > known && uses > known + (impl->pyobj_slot()->load_pyobj() != nullptr ? 1 : 0);
}

// Whether another tensor may share the memory: another tensor uses the storage, or it was made of memory that its owner
// shares (NumPy, DLPack).
bool may_share_memory(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
  return has_more_uses(storage.unsafeGetStorageImpl(), storage.use_count(), 1) || !storage.resizable();
}

// Whether another parameter, or its state, may hold the same gradient. The parameter and the caller have a reference
// each, and the gradient has one to its Python object.
bool may_be_shared(const at::Tensor& grad) {
  PyObject* const object = grad.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
  return has_more_uses(grad.unsafeGetTensorImpl(), grad.use_count(), 2) || (object && Py_REFCNT(object) > 1) ||
         may_share_memory(grad);
}

bool is_plain_layer(Plain& plain, const at::Tensor& param, const at::Tensor& grad) {
  return plain.has(param) && plain.has(grad) && is_supported(param.scalar_type()) && !param.is_complex() &&
         grad.scalar_type() == param.scalar_type() && grad.device() == param.device() && grad.sizes() == param.sizes();
}

// Whether a parameter has the attribute by which FSDP1 marks those that it has flattened and split. Its class is
// torch's, so that only its own attributes need to be looked at.
bool is_fsdp_flattened(PyObject* param) {
  static PyObject* const name = PyUnicode_InternFromString("_fsdp_flattened");
  PyObject** const attributes = _PyObject_GetDictPtr(param);
  return attributes && *attributes && PyDict_GetItemWithError(*attributes, name) != nullptr;
}

// The value of a key in a dict; null if there is none.
py::object item_of(const py::handle& dict, PyObject* key) {
  PyObject* const item = PyDict_GetItemWithError(dict.ptr(), key);
  if (!item && PyErr_Occurred()) {
    throw py::error_already_set();
  }
  return py::reinterpret_borrow<py::object>(item);
}

// Prefetches what is read of the parameters that come next, whose objects are scattered in memory. Each stage reads
// what an earlier one has prefetched: the tensor, what autograd keeps for it, its gradient, and the storages of both.
class Ahead {
 public:
  Ahead(PyObject* params, const Plain& plain) : params_(params), plain_(plain) {}

  void fetch([[maybe_unused]] Py_ssize_t position) const {
#ifdef __GNUC__
    if (const c10::TensorImpl* const tensor = tensor_at(position + 8)) {
      fetch_all(tensor);
    }
    if (const c10::TensorImpl* const tensor = tensor_at(position + 6)) {
      __builtin_prefetch(tensor->autograd_meta());
    }
    if (const c10::TensorImpl* const tensor = tensor_at(position + 4)) {
      fetch_all(tensor->grad().unsafeGetTensorImpl());
      fetch_all(plain_.storage_of(*tensor));
    }
    if (const c10::TensorImpl* const tensor = tensor_at(position + 2)) {
      fetch_all(plain_.storage_of(*tensor->grad().unsafeGetTensorImpl()));
    }
#endif
  }

 private:
  const c10::TensorImpl* tensor_at(Py_ssize_t position) const {
    if (position >= PySequence_Fast_GET_SIZE(params_)) {
      return nullptr;
    }
    PyObject* const param = PySequence_Fast_GET_ITEM(params_, position);
    return THPVariable_CheckExact(param) ? THPVariable_Unpack(param).unsafeGetTensorImpl() : nullptr;
  }

  template <typename T>
  static void fetch_all(const T* object) {
    for (size_t line = 0; line < sizeof(T); line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(object) + line);
    }
  }

  PyObject* params_;
  const Plain& plain_;
};

using Seen = ska::flat_hash_set<const c10::TensorImpl*>;

// How often a tensor was written in place.
int64_t version_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

// Calls take(param, grad, the parameter's Python object) for every plain layer of a group that was not seen before. It
// returns false for a layer that it does not take. Returns the positions of all others that may have a gradient.
//
// take may run Python code (the hash of a parameter), and with it other threads and signal handlers, which may change
// the group's list and replace gradients. So the list's size and items are read again each time, and references are
// held.
template <typename Take>
std::vector<int64_t> for_plain_layers(const py::sequence& params, Seen& seen, const Take& take) {
  const auto fast = py::reinterpret_steal<py::object>(PySequence_Fast(params.ptr(), "expected a sequence"));
  if (!fast) {
    throw py::error_already_set();
  }
  seen.reserve(seen.size() + PySequence_Fast_GET_SIZE(fast.ptr()));
  Plain plain;
  const Ahead ahead(fast.ptr(), plain);
  std::vector<int64_t> others;
  for (Py_ssize_t position = 0; position < PySequence_Fast_GET_SIZE(fast.ptr()); ++position) {
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(fast.ptr(), position));
    ahead.fetch(position);
    if (!THPVariable_CheckExact(item.ptr()) || is_fsdp_flattened(item.ptr())) {
      others.push_back(position);
      continue;
    }
    const at::Tensor& param = THPVariable_Unpack(item.ptr());
    at::Tensor grad = param.unsafeGetTensorImpl()->grad();  // which does not ask whether the parameter is a leaf
    if (!grad.defined()) {
      continue;
    }
    if (!is_plain_layer(plain, param, grad)) {
      others.push_back(position);
    } else if (seen.insert(param.unsafeGetTensorImpl()).second && !take(param, std::move(grad), item.ptr())) {
      others.push_back(position);
    }
  }
  return others;
}

// Whether a parameter group is the dict of a snapshot, a tuple of the dict and its keys and values in turn, and still
// has identical keys and values. An ellipsis stands for any value. False of subclasses of dict, which may compute
// theirs. No Python code runs here.
bool is_as_in(PyObject* group, PyObject* snapshot) {
  if (!PyDict_CheckExact(group) || !PyTuple_CheckExact(snapshot) || PyTuple_GET_SIZE(snapshot) == 0 ||
      PyTuple_GET_ITEM(snapshot, 0) != group || PyTuple_GET_SIZE(snapshot) != 1 + 2 * PyDict_GET_SIZE(group)) {
    return false;
  }
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t i = 1;
  for (Py_ssize_t at = 0; PyDict_Next(group, &at, &key, &value); i += 2) {
    PyObject* const expected = PyTuple_GET_ITEM(snapshot, i + 1);
    if (PyTuple_GET_ITEM(snapshot, i) != key || (expected != Py_Ellipsis && expected != value)) {
      return false;
    }
  }
  return true;
}

std::vector<int64_t> changed_groups(const py::list& groups, const py::list& snapshots) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto at = static_cast<Py_ssize_t>(i);
    if (i >= snapshots.size() || !is_as_in(PyList_GET_ITEM(groups.ptr(), at), PyList_GET_ITEM(snapshots.ptr(), at))) {
      positions.push_back(static_cast<int64_t>(i));
    }
  }
  return positions;
}

// Pairs of a parameter group, a dict, and its options.
template <typename Options>
using Groups = std::vector<std::pair<py::dict, Options*>>;

// Pairs of a position in such a list and one in the group's parameters.
using Positions = std::vector<std::pair<int64_t, int64_t>>;

// Calls take(params, options) for every group, and returns the positions that it returns.
template <typename Options, typename Take>
Positions for_groups(const Groups<Options>& groups, const Take& take) {
  static PyObject* const name = PyUnicode_InternFromString("params");
  Positions others;
  for (size_t group = 0; group < groups.size(); ++group) {
    const auto& [dict, options] = groups[group];
    const py::object params = item_of(dict, name);
    if (!params) {
      throw py::key_error("params");
    }
    if (!options) {
      throw py::type_error("expected the options of each group (got: None)");
    }
    for (const int64_t position : take(params, *options)) {
      others.emplace_back(static_cast<int64_t>(group), position);
    }
  }
  return others;
}

// The positions of all items for which something does not hold. No Python code runs while the list is walked.
template <typename Holds>
std::vector<int64_t> positions_without(const py::list& params, const Holds& holds) {
  std::vector<int64_t> positions;
  for (Py_ssize_t position = 0; position < PyList_GET_SIZE(params.ptr()); ++position) {
    if (!holds(PyList_GET_ITEM(params.ptr(), position))) {
      positions.push_back(position);
    }
  }
  return positions;
}

bool is_parameter(PyObject* object) { return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(ParameterClass); }

bool has_gradient_of_same_layout(PyObject* object) {
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  const at::Tensor& param = THPVariable_Unpack(object);
  const at::Tensor& grad = param.grad();
  Plain plain;
  return !grad.defined() || (is_plain_layer(plain, param, grad) && same_strides(param, grad));
}

// The bucket with a key, which most often is the last one; a new one if there is none.
template <typename Bucket, typename Key>
Bucket& bucket_for(std::vector<std::shared_ptr<Bucket>>& buckets, const Key& key) {
  for (auto bucket = buckets.rbegin(); bucket != buckets.rend(); ++bucket) {
    if ((*bucket)->key == key) {
      return **bucket;
    }
  }
  return *buckets.emplace_back(std::make_shared<Bucket>(key));
}

// Calls an op through the dispatcher, as from Python, below autograd.
template <typename Arguments>
void call(const Arguments& arguments) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow((std::string("torchlars::") + Arguments::kOp).c_str(), "")
                             .template typed<Signature<Arguments>>();
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  std::apply([](const auto&... values) { op.call(values...); }, arguments.tie());
}

// A vector for the trust ratios of layers, given their gradients or parameters, which are of one dtype.
at::Tensor empty_ratios(const Tensors& layers) {
  const auto dtype = compute_dtype(layers[0].scalar_type(), layers[0].scalar_type());
  return at::empty({static_cast<int64_t>(layers.size())}, layers[0].options().dtype(dtype));
}

// A learning rate: a number, or a tensor whose value is not read on the host.
using Lr = std::variant<double, at::Tensor>;

const at::Tensor* tensor_in(const Lr& lr) { return std::get_if<at::Tensor>(&lr); }
const c10::TensorImpl* key_of(const Lr& lr) { return tensor_in(lr) ? tensor_in(lr)->unsafeGetTensorImpl() : nullptr; }
double number_of(const Lr& lr) { return tensor_in(lr) ? 1 : std::get<double>(lr); }

// A learning rate as the lr_tensor of ops; none if it is a number.
std::optional<at::Tensor> lr_tensor_of(const std::optional<at::Tensor>& lr, c10::Device device) {
  if (!lr.has_value()) {
    return std::nullopt;
  }
  return lr->to(at::TensorOptions(device).dtype(c10::kDouble), /*non_blocking=*/!device.is_cpu());
}

// The options of LARS that all layers of a call share.
struct Dialect {
  bool decayed_norm = false;
  bool clip = false;
  bool lr_in_momentum = false;

  bool operator==(const Dialect& other) const {
    return decayed_norm == other.decayed_norm && clip == other.clip && lr_in_momentum == other.lr_in_momentum;
  }
};

// The options of a group under LARS or LAMB, which Python sets by name.
struct LarsOptions : Dialect {
  double weight_decay = 0;
  bool maximize = false;
  double trust_coef = 1;
  double eps = 0;
  std::optional<Lr> lr;  // none where LARS needs it for neither clip nor lr_in_momentum
};

// The same for a fused base, with trust ratios or, where there is no trust_coef, without.
struct FusedOptions : Dialect {
  double weight_decay = 0;
  bool maximize = false;
  Lr lr = 0.0;
  std::optional<double> trust_coef;
  std::optional<double> eps;
};

struct SgdOptions : FusedOptions {
  double momentum = 0;
  double dampening = 0;
  bool nesterov = false;
  bool momentum_in_float32 = false;
  std::optional<int64_t> min_8bit_size;  // given: layers of so many elements have momentum in 8 bits
};

// Of whose dialect lr_in_momentum is never set.
struct AdamOptions : FusedOptions {
  bool decoupled_weight_decay = false;
  double beta1 = 0;
  double beta2 = 0;
  double adam_eps = 0;
  bool state_in_float32 = false;
  bool of_updates = false;  // whether trust ratios are those of updates
};

// Layers whose gradients LARS scales in one call, or whose updates LAMB does.
struct LarsBucket {
  struct Key {
    c10::Device device;
    c10::ScalarType dtype;
    bool maximize;
    Dialect dialect;
    const c10::TensorImpl* lr;  // null: a number, or not needed

    bool operator==(const Key& other) const {
      return device == other.device && dtype == other.dtype && maximize == other.maximize && dialect == other.dialect &&
             lr == other.lr;
    }
  };

  explicit LarsBucket(const Key& key) : key(key) {}

  Key key;
  PyTensors params;
  Tensors grads;
  Tensors old_params;
  std::optional<at::Tensor> lr;
  Numbers weight_decays;
  Numbers trust_coefs;
  Numbers eps;
  Numbers lrs;

  // Scales the gradients. Returns the trust ratios.
  at::Tensor adapt(const std::optional<at::Tensor>& inv_scale) const {
    ScaleGradientsArguments arguments;
    arguments.grads = grads;
    arguments.params = params.tensors();
    arguments.maximize = key.maximize;
    arguments.weight_decays = weight_decays;
    arguments.decayed_norm = key.dialect.decayed_norm;
    arguments.ratios = empty_ratios(grads);
    arguments.trust_coefs = trust_coefs;
    arguments.eps = eps;
    arguments.clip = key.dialect.clip;
    arguments.lrs = lrs;
    arguments.lr_in_momentum = key.dialect.lr_in_momentum;
    arguments.lr_tensor = lr_tensor_of(lr, key.device);
    arguments.inv_scale = inv_scale;
    call(arguments);
    return *arguments.ratios;
  }

  // Copies the parameters and their lr before the base's step. Lets go of gradients, which the base reads faster if it
  // alone does.
  void copy_params() {
    grads.clear();
    const py::gil_scoped_release no_gil;
    old_params = copies(params.tensors());
    if (lr.has_value()) {
      const auto options = at::TensorOptions(key.device).dtype(c10::kDouble);
      lr = lr->detach().to(options, /*non_blocking=*/!key.device.is_cpu(), /*copy=*/true);
    }
  }

  // Scales the updates since then. Returns the trust ratios.
  at::Tensor scale_updates() {
    params.read_again();
    const py::gil_scoped_release no_gil;
    ScaleUpdatesArguments arguments;
    arguments.params = params.tensors();
    arguments.old_params = old_params;
    arguments.ratios = empty_ratios(old_params);
    arguments.trust_coefs = trust_coefs;
    arguments.eps = eps;
    arguments.clip = key.dialect.clip;
    arguments.lrs = lrs;
    arguments.lr_tensor = lr_tensor_of(lr, key.device);
    call(arguments);
    return arguments.ratios;
  }
};

class LarsLayers {
 public:
  Positions add(const Groups<LarsOptions>& groups) {
    return for_groups(
        groups, [&](const py::sequence& params, const LarsOptions& options) { return add_group(params, options); });
  }

  std::vector<std::shared_ptr<LarsBucket>> buckets;
  bool shares_memory = false;        // whether any gradient may share its memory
  bool params_share_memory = false;  // whether any parameter may
  bool same_layout = true;           // whether all gradients lie in memory as their parameters do
  int64_t versions = 0;              // the sum of those of all parameters

 private:
  std::vector<int64_t> add_group(const py::sequence& params, const LarsOptions& options) {
    const c10::TensorImpl* const lr_key = options.lr.has_value() ? key_of(*options.lr) : nullptr;
    return for_plain_layers(params, seen_, [&](const at::Tensor& param, at::Tensor grad, PyObject* object) {
      shares_memory = shares_memory || may_be_shared(grad);
      params_share_memory = params_share_memory || may_share_memory(param);
      same_layout = same_layout && same_strides(param, grad);
      versions += version_of(param);
      LarsBucket& bucket =
          bucket_for(buckets, LarsBucket::Key{param.device(), param.scalar_type(), options.maximize, options, lr_key});
      bucket.params.add(object);
      bucket.grads.push_back(std::move(grad));
      bucket.weight_decays.push_back(options.weight_decay);
      bucket.trust_coefs.push_back(options.trust_coef);
      bucket.eps.push_back(options.eps);
      if (options.lr.has_value()) {
        bucket.lrs.push_back(number_of(*options.lr));
        if (lr_key) {
          bucket.lr = *tensor_in(*options.lr);
        }
      }
      return true;
    });
  }

  Seen seen_;
};

// What the layers of a bucket of a fused base have in common.
struct FusedKey {
  FusedKey(const at::Tensor& param, const FusedOptions& options)
      : device(param.device()),
        dtype(param.scalar_type()),
        lr(key_of(options.lr)),
        maximize(options.maximize),
        is_adapted(options.trust_coef.has_value()),
        dialect(options) {}

  auto tie() const { return std::tie(device, dtype, lr, maximize, is_adapted, dialect); }

  c10::Device device;
  c10::ScalarType dtype;
  const c10::TensorImpl* lr;  // null: a number
  bool maximize;
  bool is_adapted;
  Dialect dialect;
};

// Layers of which a fused base takes the step in one call, with or without trust ratios.
template <typename AnyKey>
struct FusedBucket {
  using Key = AnyKey;

  explicit FusedBucket(const Key& key) : key(key) {}

  void add(PyObject* param, at::Tensor grad, const FusedOptions& options) {
    params.add(param);
    grads.push_back(std::move(grad));
    if (tensor_in(options.lr)) {
      lr = *tensor_in(options.lr);
    }
    weight_decays.push_back(options.weight_decay);
    trust_coefs.push_back(options.trust_coef.value_or(0));
    eps.push_back(options.eps.value_or(0));
    lrs.push_back(number_of(options.lr));
  }

  // Sets the arguments that the ops of all bases have, and calls the op. Returns the trust ratios, if there are any.
  template <typename Arguments>
  std::optional<at::Tensor> call_with(Arguments arguments, const std::optional<at::Tensor>& inv_scale) const {
    arguments.params = params.tensors();
    arguments.grads = grads;
    arguments.maximize = key.maximize;
    arguments.weight_decays = weight_decays;
    arguments.lrs = lrs;
    arguments.lr_tensor = lr_tensor_of(lr, key.device);
    arguments.inv_scale = inv_scale;
    if (key.is_adapted) {
      arguments.decayed_norm = key.dialect.decayed_norm;
      arguments.ratios = empty_ratios(grads);
      arguments.trust_coefs = trust_coefs;
      arguments.eps = eps;
      arguments.clip = key.dialect.clip;
    }
    call(arguments);
    return arguments.ratios;
  }

  Key key;
  PyTensors params;
  Tensors grads;
  std::optional<at::Tensor> lr;
  Numbers weight_decays;
  Numbers trust_coefs;
  Numbers eps;
  Numbers lrs;
};

// Gathers the layers of a fused base. A layer without state, or with one that a kernel cannot take, is left to the slow
// path, which makes one.
template <typename Bucket, typename Options>
class FusedLayers {
 public:
  virtual ~FusedLayers() = default;

  // state: the optimizer's.
  Positions add(const Groups<Options>& groups, const py::dict& state) {
    return for_groups(groups, [&](const py::sequence& params, const Options& options) {
      return for_plain_layers(params, seen_, [&](const at::Tensor& param, at::Tensor grad, PyObject* object) {
        Bucket* const bucket = bucket_of(param, object, state, options);
        if (bucket != nullptr) {
          shares_memory = shares_memory || may_share_memory(param);
          bucket->add(object, std::move(grad), options);
        }
        return bucket != nullptr;
      });
    });
  }

  std::vector<std::shared_ptr<Bucket>> buckets;
  bool shares_memory = false;  // whether any parameter or tensor of the state may share its memory

 protected:
  // The bucket of a layer, to which its state has been added; null if it is left to the slow path.
  virtual Bucket* bucket_of(const at::Tensor& param, PyObject* object, const py::dict& state,
                            const Options& options) = 0;

  // The state of one parameter, a dict; null if there is none. States most often lie in the order of the parameters,
  // some of which may have no gradient: so the next few are looked at first. A tensor's hash is a Python function.
  py::object state_of(const py::dict& state, PyObject* object) {
    constexpr int kLookedAt = 8;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    Py_ssize_t next = next_state_;
    for (int i = 0; i < kLookedAt && key != object && PyDict_Next(state.ptr(), &next, &key, &value); ++i) {
    }
    py::object own;
    if (key == object) {
      next_state_ = next;
      own = py::reinterpret_borrow<py::object>(value);
    } else {
      own = item_of(state, object);
    }
    return own && PyDict_Check(own.ptr()) ? own : py::object();
  }

  // Whether a kernel can take a value of the state. If so, notes whether it may share its memory.
  bool is_state(const py::object& value, c10::ScalarType dtype, c10::Device device, at::IntArrayRef sizes) {
    if (!value || !THPVariable_CheckExact(value.ptr())) {
      return false;
    }
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (!plain_.has(tensor) || tensor.scalar_type() != dtype || tensor.device() != device || tensor.sizes() != sizes) {
      return false;
    }
    // The references that are known: the caller's and that of the state.
    shares_memory = shares_memory || Py_REFCNT(value.ptr()) > 2 || may_share_memory(tensor);
    return true;
  }

  // The same of one that has its parameter's shape and memory order.
  bool is_state_of(const at::Tensor& param, const py::object& value, c10::ScalarType dtype) {
    return is_state(value, dtype, param.device(), param.sizes()) &&
           same_strides(param, THPVariable_Unpack(value.ptr()));
  }

 private:
  Seen seen_;
  Plain plain_;
  Py_ssize_t next_state_ = 0;  // where PyDict_Next goes on
};

struct SgdKey : FusedKey {
  SgdKey(const at::Tensor& param, const SgdOptions& options) : FusedKey(param, options), nesterov(options.nesterov) {}

  bool operator==(const SgdKey& other) const {
    return tie() == other.tie() && nesterov == other.nesterov && momentum_dtype == other.momentum_dtype;
  }

  bool nesterov;
  std::optional<c10::ScalarType> momentum_dtype;  // none: no momentum
};

struct SgdBucket : FusedBucket<SgdKey> {
  using FusedBucket::FusedBucket;

  // Takes the step. Returns the trust ratios, if there are any.
  std::optional<at::Tensor> update(const std::optional<at::Tensor>& inv_scale) const {
    SgdArguments arguments;
    arguments.momentum_buffers = momentum_buffers.tensors();
    if (key.momentum_dtype == c10::kChar) {
      arguments.momentum_scales = momentum_scales.tensors();
    }
    arguments.lr_in_momentum = key.is_adapted && key.dialect.lr_in_momentum;
    arguments.momentums = momentums;
    arguments.dampenings = dampenings;
    arguments.nesterov = key.nesterov;
    return call_with(arguments, inv_scale);
  }

  PyTensors momentum_buffers;  // or codes
  PyTensors momentum_scales;
  Numbers momentums;
  Numbers dampenings;
};

class SgdLayers : public FusedLayers<SgdBucket, SgdOptions> {
  SgdBucket* bucket_of(const at::Tensor& param, PyObject* object, const py::dict& state,
                       const SgdOptions& options) override {
    SgdKey key(param, options);
    py::object found, scales;
    if (options.momentum != 0) {
      static PyObject* const names[] = {PyUnicode_InternFromString("momentum_buffer"),
                                        PyUnicode_InternFromString("momentum_codes"),
                                        PyUnicode_InternFromString("momentum_scales")};
      const py::object own_state = state_of(state, object);
      if (!own_state) {
        return nullptr;
      }
      const bool is_in_8bit = options.min_8bit_size.has_value() && is_coded(param, *options.min_8bit_size);
      key.momentum_dtype = is_in_8bit                                                 ? c10::kChar
                           : options.momentum_in_float32 && param.element_size() == 2 ? c10::kFloat
                                                                                      : param.scalar_type();
      if (PyDict_GET_SIZE(own_state.ptr()) > (is_in_8bit ? 2 : 1)) {  // there may be momentum of both kinds
        const py::object other = item_of(own_state, names[is_in_8bit ? 0 : 1]);
        if (other && !other.is_none()) {
          return nullptr;
        }
      }
      found = item_of(own_state, names[is_in_8bit ? 1 : 0]);
      if (!is_state_of(param, found, *key.momentum_dtype)) {
        return nullptr;
      }
      if (is_in_8bit) {
        scales = item_of(own_state, names[2]);
        if (!is_state(scales, c10::kFloat, param.device(), scales_shape(param)) ||
            !THPVariable_Unpack(scales.ptr()).is_contiguous()) {
          return nullptr;
        }
      }
    }
    SgdBucket& bucket = bucket_for(buckets, key);
    if (found) {
      bucket.momentum_buffers.add(found.ptr());
    }
    if (scales) {
      bucket.momentum_scales.add(scales.ptr());
    }
    bucket.momentums.push_back(options.momentum);
    bucket.dampenings.push_back(options.dampening);
    return &bucket;
  }
};

struct AdamKey : FusedKey {
  AdamKey(const at::Tensor& param, const AdamOptions& options)
      : FusedKey(param, options),
        beta1(options.beta1),
        beta2(options.beta2),
        adam_eps(options.adam_eps),
        decoupled_weight_decay(options.decoupled_weight_decay),
        of_updates(options.of_updates),
        state_dtype(options.state_in_float32 && param.element_size() == 2 ? c10::kFloat : param.scalar_type()) {}

  auto own() const { return std::tie(beta1, beta2, adam_eps, decoupled_weight_decay, of_updates, state_dtype); }
  bool operator==(const AdamKey& other) const { return tie() == other.tie() && own() == other.own(); }

  double beta1;
  double beta2;
  double adam_eps;
  bool decoupled_weight_decay;
  bool of_updates;
  c10::ScalarType state_dtype;
};

struct AdamBucket : FusedBucket<AdamKey> {
  using FusedBucket::FusedBucket;

  // Takes the step. Returns the trust ratios, if there are any.
  std::optional<at::Tensor> update(const std::optional<at::Tensor>& inv_scale) const {
    AdamArguments arguments;
    arguments.exp_avgs = exp_avgs.tensors();
    arguments.exp_avg_sqs = exp_avg_sqs.tensors();
    arguments.steps = steps.tensors();
    arguments.decoupled_weight_decay = key.decoupled_weight_decay;
    arguments.beta1 = key.beta1;
    arguments.beta2 = key.beta2;
    arguments.adam_eps = key.adam_eps;
    arguments.of_updates = key.of_updates;
    return call_with(arguments, inv_scale);
  }

  PyTensors exp_avgs;
  PyTensors exp_avg_sqs;
  PyTensors steps;
};

class AdamLayers : public FusedLayers<AdamBucket, AdamOptions> {
  AdamBucket* bucket_of(const at::Tensor& param, PyObject* object, const py::dict& state,
                        const AdamOptions& options) override {
    static PyObject* const names[] = {PyUnicode_InternFromString("exp_avg"), PyUnicode_InternFromString("exp_avg_sq"),
                                      PyUnicode_InternFromString("step")};
    const py::object own_state = state_of(state, object);
    if (!own_state) {
      return nullptr;
    }
    const AdamKey key(param, options);
    const py::object exp_avg = item_of(own_state, names[0]);
    const py::object exp_avg_sq = item_of(own_state, names[1]);
    const py::object step = item_of(own_state, names[2]);
    if (!is_state_of(param, exp_avg, key.state_dtype) || !is_state_of(param, exp_avg_sq, key.state_dtype) ||
        !is_state(step, c10::kFloat, param.device(), {})) {
      return nullptr;
    }
    AdamBucket& bucket = bucket_for(buckets, key);
    bucket.exp_avgs.add(exp_avg.ptr());
    bucket.exp_avg_sqs.add(exp_avg_sq.ptr());
    bucket.steps.add(step.ptr());
    return &bucket;
  }
};

// The positions of those tensors whose memory overlaps that of another one. Where a storage's pointer need not be an
// address, only tensors of one storage can overlap.
std::vector<int64_t> overlapping(const Tensors& tensors) {
  struct Span {
    const c10::StorageImpl* storage;  // null: begin and end are addresses
    uintptr_t begin;
    uintptr_t end;
    int64_t position;
  };
  std::vector<Span> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (tensor.layout() != c10::kStrided || !tensor.has_storage() || tensor.numel() == 0) {
      continue;
    }
    const c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
    const bool has_address = (tensor.is_cpu() || tensor.is_cuda()) && storage->data() != nullptr;
    const uintptr_t begin = (has_address ? reinterpret_cast<uintptr_t>(storage->data()) : 0) +
                            tensor.storage_offset() * tensor.element_size();
    spans.push_back({has_address ? nullptr : storage, begin, begin + extent(tensor), static_cast<int64_t>(i)});
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.storage != b.storage ? std::less<>()(a.storage, b.storage) : a.begin < b.begin;
  });
  std::vector<int64_t> positions;
  const Span* furthest = nullptr;  // of those before, in this storage: the one that ends last
  for (const Span& span : spans) {
    if (furthest && span.storage == furthest->storage && span.begin < furthest->end) {
      positions.push_back(furthest->position);
      positions.push_back(span.position);
    }
    if (!furthest || span.storage != furthest->storage || span.end > furthest->end) {
      furthest = &span;
    }
  }
  std::sort(positions.begin(), positions.end());
  positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
  return positions;
}

// What the options of a fused base have in common.
template <typename Options>
void bind_hyper_parameters(py::class_<Options>& options) {
  options.def(py::init<>())
      .def_readwrite("weight_decay", &Options::weight_decay)
      .def_readwrite("maximize", &Options::maximize)
      .def_readwrite("lr", &Options::lr)
      .def_readwrite("trust_coef", &Options::trust_coef)
      .def_readwrite("eps", &Options::eps)
      .def_readwrite("decayed_norm", &Options::decayed_norm)
      .def_readwrite("clip", &Options::clip)
      .def_readwrite("lr_in_momentum", &Options::lr_in_momentum);
}

// The layers and buckets of a fused base.
template <typename Bucket, typename Layers>
void bind_layers(py::module_& m, const char* bucket, const char* layers) {
  py::class_<Bucket, std::shared_ptr<Bucket>>(m, bucket, "Layers of which one call takes the step.")
      .def_property_readonly("params", [](const Bucket& self) { return self.params.objects(); })
      .def("update", &Bucket::update, py::arg("inv_scale") = py::none(), py::call_guard<py::gil_scoped_release>(),
           "Take the step. Return the trust ratios, or None if there are none.");
  py::class_<Layers>(m, layers, "The layers of one step of a fused base on the fast path, in buckets.")
      .def(py::init<>())
      .def(
          "add", &Layers::add, py::arg("groups"), py::arg("state"),
          "Take the plain layers of pairs of a group and its options. Return the position of the pair and the position "
          "in the group of those that are left to the slow path.")
      .def_readonly("buckets", &Layers::buckets)
      .def_readonly("shares_memory", &Layers::shares_memory,
                    "Whether any parameter or tensor of the state may share its memory.");
}

}  // namespace

void bind_fast_path(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("has_memory", &has_memory, py::arg("tensor"), "Return whether a tensor's storage is as large as the tensor.");
  m.def("overlapping", &overlapping, py::arg("tensors"),
        "Return the positions of those tensors whose memory overlaps that of another one.");
  m.def(
      "positions_of_other_layout",
      [](const py::list& params) { return positions_without(params, has_gradient_of_same_layout); }, py::arg("params"),
      "Return the positions of the parameters whose gradient may lie in memory in another order than they do.");
  m.def(
      "positions_of_non_parameters",
      [](const std::vector<py::list>& groups) {
        std::vector<std::pair<int64_t, int64_t>> positions;
        for (size_t group = 0; group < groups.size(); ++group) {
          for (const int64_t position : positions_without(groups[group], is_parameter)) {
            positions.emplace_back(static_cast<int64_t>(group), position);
          }
        }
        return positions;
      },
      py::arg("groups"), "Return the group and position of all items whose type is not exactly nn.Parameter.");
  m.def("changed_groups", &changed_groups, py::arg("groups"), py::arg("snapshots"),
        "Return the positions of the parameter groups that are not as in their snapshots.");
  py::class_<LarsOptions>(m, "LarsOptions", "The options of a group under LARS or LAMB.")
      .def(py::init<>())
      .def_readwrite("weight_decay", &LarsOptions::weight_decay)
      .def_readwrite("maximize", &LarsOptions::maximize)
      .def_readwrite("trust_coef", &LarsOptions::trust_coef)
      .def_readwrite("eps", &LarsOptions::eps)
      .def_readwrite("decayed_norm", &LarsOptions::decayed_norm)
      .def_readwrite("clip", &LarsOptions::clip)
      .def_readwrite("lr_in_momentum", &LarsOptions::lr_in_momentum)
      .def_readwrite("lr", &LarsOptions::lr);
  auto sgd_options = py::class_<SgdOptions>(
      m, "SgdOptions", "The hyper-parameters of a group of SGD, with its options under LARS, if any.");
  bind_hyper_parameters(sgd_options);
  sgd_options.def_readwrite("momentum", &SgdOptions::momentum)
      .def_readwrite("dampening", &SgdOptions::dampening)
      .def_readwrite("nesterov", &SgdOptions::nesterov)
      .def_readwrite("momentum_in_float32", &SgdOptions::momentum_in_float32)
      .def_readwrite("min_8bit_size", &SgdOptions::min_8bit_size);
  auto adam_options = py::class_<AdamOptions>(
      m, "AdamOptions", "The hyper-parameters of a group of Adam, with its options under LARS or LAMB, if any.");
  bind_hyper_parameters(adam_options);
  adam_options.def_readwrite("decoupled_weight_decay", &AdamOptions::decoupled_weight_decay)
      .def_readwrite("beta1", &AdamOptions::beta1)
      .def_readwrite("beta2", &AdamOptions::beta2)
      .def_readwrite("adam_eps", &AdamOptions::adam_eps)
      .def_readwrite("state_in_float32", &AdamOptions::state_in_float32)
      .def_readwrite("of_updates", &AdamOptions::of_updates);
  py::class_<LarsBucket, std::shared_ptr<LarsBucket>>(m, "LarsBucket",
                                                      "Layers whose gradients or updates one call scales.")
      .def_property_readonly("params", [](const LarsBucket& bucket) { return bucket.params.objects(); })
      .def("adapt", &LarsBucket::adapt, py::arg("inv_scale") = py::none(), no_gil,
           "Scale the gradients, and return the trust ratios.")
      .def("copy_params", &LarsBucket::copy_params, "Copy the parameters and their lr before the base's step.")
      .def("scale_updates", &LarsBucket::scale_updates, "Scale the updates since then, and return the trust ratios.");
  py::class_<LarsLayers>(m, "LarsLayers", "The layers of one step on the fast path, in buckets.")
      .def(py::init<>())
      .def(
          "add", &LarsLayers::add, py::arg("groups"),
          "Take the plain layers of pairs of a group and its options. Return the position of the pair and the position "
          "in the group of those that are left to the slow path.")
      .def_readonly("buckets", &LarsLayers::buckets)
      .def_readonly("shares_memory", &LarsLayers::shares_memory, "Whether any gradient may share its memory.")
      .def_readonly("params_share_memory", &LarsLayers::params_share_memory, "Whether any parameter may.")
      .def_readonly("same_layout", &LarsLayers::same_layout, "Whether all gradients lie in memory as parameters do.")
      .def_readonly("versions", &LarsLayers::versions, "The sum of the versions of all parameters.");
  bind_layers<SgdBucket, SgdLayers>(m, "SgdBucket", "SgdLayers");
  bind_layers<AdamBucket, AdamLayers>(m, "AdamBucket", "AdamLayers");
}

}  // namespace torchlars
