// What a recorded step rests on (pymllm/engine/watch.py): the dictionaries that hold a model's attributes, its lists,
// and the places of its tensors. One call tells whether all are as they were; it takes a few microseconds.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace pymllm {
namespace {

// Up to Python 3.11 every change gives a dictionary a number that none had before (PEP 509). Later ones call back
// instead, but not at every change: 3.13 forgets those of an object's attributes.
#if PY_VERSION_HEX < 0x030C0000
constexpr bool kNumbered = true;
std::uint64_t version_of(PyObject *dict) { return reinterpret_cast<PyDictObject *>(dict)->ma_version_tag; }
#else
constexpr bool kNumbered = false;
std::uint64_t version_of(PyObject *) { return 0; }
#endif

PyObject *attributes_of(PyTypeObject *type) {
#if PY_VERSION_HEX < 0x030D0000
  return type->tp_dict;
#else
  PyObject *dict = PyType_GetDict(type);
  Py_XDECREF(dict); // the type keeps it
  return dict;
#endif
}

// Asks for memory that is looked at soon: 200 MB of weights have gone through the caches since it was last. This is never
// wrong, only slow where another object lies there by now.
constexpr std::size_t kAhead = 12;
inline void fetch(const void *at, std::size_t bytes) {
#if defined(__GNUC__) || defined(__clang__)
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(at) + i);
#else
  static_cast<void>(at), static_cast<void>(bytes);
#endif
}

// torch's stable C interface, by addresses: the extension is built without torch.
struct Torch {
  using Tensor = void *;
  int (*data)(Tensor, void **);
  int (*dim)(Tensor, std::int64_t *);
  int (*sizes)(Tensor, std::int64_t **);
  int (*strides)(Tensor, std::int64_t **);
  int (*dtype)(Tensor, std::int32_t *);
  int (*release)(Tensor);
};

class Watch {
public:
  explicit Watch(const std::vector<std::uintptr_t> &functions) {
    if (functions.size() * sizeof(void *) != sizeof torch_) throw std::invalid_argument("six functions of torch's");
    std::memcpy(&torch_, functions.data(), sizeof torch_);
  }
  Watch(const Watch &) = delete;
  Watch &operator=(const Watch &) = delete;
  ~Watch() {
    for (const Held &held : tensors_) torch_.release(held.tensor);
  }

  // Who calls keeps what is added, and what it holds, for as long as this watches.
  void add_dict(nb::handle dict) {
    if (!PyDict_Check(dict.ptr())) throw nb::type_error("a dict");
    if (kNumbered)
      dicts_.push_back({dict.ptr(), version_of(dict.ptr())});
    else
      compare(dict);
  }
  // Returns the dictionaries that were changed, be it back to what they held.
  nb::list stirred() const {
    nb::list found;
    for (const Versioned &held : dicts_)
      if (version_of(held.dict) != held.version) found.append(nb::borrow(held.dict));
    return found;
  }
  // Compares a dictionary by what it holds from now on.
  void compare(nb::handle dict) {
    dicts_.erase(std::remove_if(dicts_.begin(), dicts_.end(),
                                [dict](const Versioned &held) { return held.dict == dict.ptr(); }),
                 dicts_.end());
    Contents contents{dict.ptr(), {}};
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value);) contents.values.emplace_back(key, value);
    compared_.push_back(std::move(contents));
  }
  void add_type(nb::handle type) {
    if (!PyType_Check(type.ptr())) throw nb::type_error("a type");
    if (PyObject *dict = attributes_of(reinterpret_cast<PyTypeObject *>(type.ptr()))) add_dict(dict);
  }
  // Looks at the class of an object, which may be set as its attributes are.
  void add_object(nb::handle object) { objects_.push_back({object.ptr(), Py_TYPE(object.ptr())}); }
  void add_list(nb::handle list) {
    if (!PyList_Check(list.ptr())) throw nb::type_error("a list");
    Items items{list.ptr(), {}};
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i) items.values.push_back(PyList_GET_ITEM(list.ptr(), i));
    lists_.push_back(std::move(items));
  }
  void add_cell(nb::handle cell) {
    if (!PyCell_Check(cell.ptr())) throw nb::type_error("a cell");
    cells_.push_back({cell.ptr(), PyCell_GET(cell.ptr())});
  }
  // tensor: a capsule with an at::Tensor of its own, which this takes.  impl, storage: where torch has what it knows of the
  // tensor and of its memory, for `fetch` alone.  False: torch does not tell its place.
  bool add_tensor(nb::handle capsule, std::uintptr_t impl, std::uintptr_t storage) {
    Torch::Tensor tensor = PyCapsule_GetPointer(capsule.ptr(), nullptr);
    if (tensor == nullptr) throw nb::python_error();
    Held held{tensor, reinterpret_cast<void *>(impl), reinterpret_cast<void *>(storage), nullptr, 0, 0, numbers_.size()};
    std::int64_t *sizes = nullptr, *strides = nullptr;
    if (torch_.data(tensor, &held.data) || torch_.dim(tensor, &held.dim) || torch_.dtype(tensor, &held.dtype) ||
        torch_.sizes(tensor, &sizes) || torch_.strides(tensor, &strides)) {
      torch_.release(tensor);
      return false;
    }
    numbers_.insert(numbers_.end(), sizes, sizes + held.dim);
    numbers_.insert(numbers_.end(), strides, strides + held.dim);
    tensors_.push_back(held);
    return true;
  }

  // Ends the additions, for now: what lies side by side is then looked at together, as caches and their pages have gone.
  void settle() {
    std::sort(dicts_.begin(), dicts_.end(), [](const Versioned &a, const Versioned &b) { return a.dict < b.dict; });
  }

  bool changed() const {
    for (std::size_t i = 0; i < dicts_.size(); ++i) {
      if (i + kAhead < dicts_.size()) fetch(dicts_[i + kAhead].dict, 48);
      if (version_of(dicts_[i].dict) != dicts_[i].version) return true;
    }
    for (const Contents &held : compared_) {
      if (PyDict_GET_SIZE(held.dict) != static_cast<Py_ssize_t>(held.values.size())) return true;
      PyObject *key, *value;
      std::size_t i = 0;
      for (Py_ssize_t at = 0; PyDict_Next(held.dict, &at, &key, &value); ++i)
        if (key != held.values[i].first || value != held.values[i].second) return true;
    }
    for (std::size_t i = 0; i < objects_.size(); ++i) {
      if (i + kAhead < objects_.size()) fetch(objects_[i + kAhead].object, 16);
      if (Py_TYPE(objects_[i].object) != objects_[i].type) return true;
    }
    for (const Cell &held : cells_)
      if (PyCell_GET(held.cell) != held.value) return true;
    for (std::size_t at = 0; at < lists_.size(); ++at) {
      const Items &held = lists_[at];
      if (at + kAhead < lists_.size()) fetch(lists_[at + kAhead].list, 40);
      if (PyList_GET_SIZE(held.list) != static_cast<Py_ssize_t>(held.values.size())) return true;
      for (std::size_t i = 0; i < held.values.size(); ++i)
        if (PyList_GET_ITEM(held.list, i) != held.values[i]) return true;
    }
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      if (i + kAhead < tensors_.size()) {
        const Held &soon = tensors_[i + kAhead];
        fetch(soon.tensor, 8);
        fetch(soon.impl, 256);
        fetch(soon.storage, 128);
      }
      if (moved(tensors_[i])) return true;
    }
    return false;
  }

private:
  struct Versioned {
    PyObject *dict;
    std::uint64_t version;
  };
  struct Contents {
    PyObject *dict;
    std::vector<std::pair<PyObject *, PyObject *>> values;
  };
  struct Cell {
    PyObject *cell, *value;
  };
  struct Object {
    PyObject *object;
    PyTypeObject *type;
  };
  struct Items {
    PyObject *list;
    std::vector<PyObject *> values;
  };
  // impl, storage: as of `add_tensor`.  numbers: where its sizes and strides begin in `numbers_`.
  struct Held {
    Torch::Tensor tensor;
    const void *impl, *storage;
    void *data;
    std::int64_t dim;
    std::int32_t dtype;
    std::size_t numbers;
  };

  bool moved(const Held &held) const {
    void *data = nullptr;
    std::int64_t dim = -1, *sizes = nullptr, *strides = nullptr;
    std::int32_t dtype = -1;
    if (torch_.data(held.tensor, &data) || data != held.data) return true;
    if (torch_.dim(held.tensor, &dim) || dim != held.dim) return true;
    if (torch_.dtype(held.tensor, &dtype) || dtype != held.dtype) return true;
    if (torch_.sizes(held.tensor, &sizes) || torch_.strides(held.tensor, &strides)) return true;
    const std::size_t bytes = static_cast<std::size_t>(dim) * sizeof(std::int64_t);
    const std::int64_t *numbers = numbers_.data() + held.numbers;
    return dim && (std::memcmp(sizes, numbers, bytes) || std::memcmp(strides, numbers + dim, bytes));
  }

  Torch torch_{};
  std::vector<Versioned> dicts_;
  std::vector<Contents> compared_;
  std::vector<Cell> cells_;
  std::vector<Object> objects_;
  std::vector<Items> lists_;
  std::vector<Held> tensors_;
  std::vector<std::int64_t> numbers_;
};

} // namespace

void register_watch(nb::module_ &m) {
  nb::class_<Watch>(m, "Watch")
      .def(nb::init<const std::vector<std::uintptr_t> &>(), nb::arg("functions"))
      .def("add_dict", &Watch::add_dict)
      .def("add_type", &Watch::add_type)
      .def("add_object", &Watch::add_object)
      .def("add_list", &Watch::add_list)
      .def("add_cell", &Watch::add_cell)
      .def("add_tensor", &Watch::add_tensor)
      .def("stirred", &Watch::stirred)
      .def("compare", &Watch::compare)
      .def("settle", &Watch::settle)
      .def("changed", &Watch::changed, "Tell whether anything was set, replaced or moved since it was added.");
}

} // namespace pymllm
