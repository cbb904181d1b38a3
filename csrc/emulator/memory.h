/*
Checked arrays for kernels under the emulator: shared memory that knows which bytes were written, and spans of global
memory that know their length. Under nvcc csrc/cuda/device.cuh has the plain things of the same names.

An element is handed out as a Ref, which reads when it is converted and writes when it is assigned. So `float x = a[i];`
and `a[i] = x;` mean what they do under nvcc; `auto x = a[i];` would hold the Ref: write the type.
*/
#pragma once

#include <concepts>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulator/machine.h"

namespace fastppo::emulator {

// An index that remembers where in the kernel it was used: the conversion happens there.
struct Index {
  int64_t value;
  Where where;

  template <std::integral I>
  Index(I value, std::source_location at = std::source_location::current())
      : value(static_cast<int64_t>(value)), where(at) {}
};

[[noreturn]] inline void fail_index(const char* what, int64_t index, int64_t size, Where where) {
  fail(std::string(what) + " index " + std::to_string(index) + " is out of range, size " + std::to_string(size), where);
}

inline void count_load(int64_t bytes) {
#if !defined(FASTPPO_EMULATOR_THREADS)
  machine.bytes_loaded += bytes;
#endif
}
inline void count_store(int64_t bytes) {
#if !defined(FASTPPO_EMULATOR_THREADS)
  machine.bytes_stored += bytes;
#endif
}

// Flags are not part of the kernel: under ThreadSanitizer they must neither race nor order anything.
inline bool is_written(const uint8_t* flags, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    if (__atomic_load_n(flags + i, __ATOMIC_RELAXED) == 0) {
      return false;
    }
  }
  return true;
}
inline void set_written(uint8_t* flags, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    __atomic_store_n(flags + i, uint8_t{1}, __ATOMIC_RELAXED);
  }
}

template <class T>
class SharedArray;

// What an element of either memory can do. Self has get() and set().
template <class Self, class T>
struct RefOperators {
  operator T() const { return self().get(); }
  const Self& operator+=(const T& x) const { return self().set(self().get() + x), self(); }
  const Self& operator-=(const T& x) const { return self().set(self().get() - x), self(); }
  const Self& operator*=(const T& x) const { return self().set(self().get() * x), self(); }
  const Self& operator|=(const T& x) const { return self().set(self().get() | x), self(); }

 private:
  const Self& self() const { return static_cast<const Self&>(*this); }
};

template <class T>
class SharedRef : public RefOperators<SharedRef<T>, T> {
 public:
  SharedRef(const SharedArray<T>& array, int64_t index, Where where) : array_(array), index_(index), where_(where) {}

  T get() const {
    if (!is_written(array_.written() + index_ * sizeof(T), sizeof(T))) {
      fail("uninitialised read of shared memory, index " + std::to_string(index_), where_);
    }
    return array_.data()[index_];
  }
  void set(const T& x) const {
    array_.data()[index_] = x;
    set_written(array_.written() + index_ * sizeof(T), sizeof(T));
  }
  const SharedRef& operator=(const T& x) const { return set(x), *this; }
  const SharedRef& operator=(const SharedRef& x) const { return set(x.get()), *this; }
  SharedArray<T> operator&() const { return array_ + index_; }

 private:
  SharedArray<T> array_;
  int64_t index_;
  Where where_;
};

template <class T>
class SharedArray {
 public:
  static_assert(std::is_trivially_copyable_v<T>);

  SharedArray(SharedMemory memory, int64_t size)
      : data_(reinterpret_cast<T*>(memory.data)), written_(memory.written), size_(size) {}

  SharedRef<T> operator[](Index i) const {
    if (i.value < 0 || i.value >= size_) {
      fail_index("shared memory", i.value, size_, i.where);
    }
    return {*this, i.value, i.where};
  }
  SharedRef<T> operator*() const { return (*this)[0]; }
  SharedArray operator+(Index i) const {
    if (i.value < 0 || i.value > size_) {
      fail_index("shared memory", i.value, size_, i.where);
    }
    return {{reinterpret_cast<std::byte*>(data_ + i.value), written_ + i.value * sizeof(T)}, size_ - i.value};
  }

  // The same bytes as another type, as reinterpret_cast does under nvcc.
  template <class U>
  SharedArray<U> as() const {
    const int64_t bytes = size_ * static_cast<int64_t>(sizeof(T));
    return {{reinterpret_cast<std::byte*>(data_), written_}, bytes / static_cast<int64_t>(sizeof(U))};
  }

  T* data() const { return data_; }
  uint8_t* written() const { return written_; }
  int64_t size() const { return size_; }

 private:
  T* data_;
  uint8_t* written_;
  int64_t size_;
};

template <class T>
class GlobalRef : public RefOperators<GlobalRef<T>, T> {
 public:
  explicit GlobalRef(T* place) : place_(place) {}

  T get() const { return count_load(sizeof(T)), *place_; }
  void set(const T& x) const { count_store(sizeof(T)), *place_ = x; }
  const GlobalRef& operator=(const T& x) const { return set(x), *this; }
  const GlobalRef& operator=(const GlobalRef& x) const { return set(x.get()), *this; }
  T* operator&() const { return place_; }

 private:
  T* place_;
};

} // namespace fastppo::emulator
