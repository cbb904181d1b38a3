/*
Which instruction set the vector loops run with. Every csrc/cpu/vec/<concept>.cpp is compiled once per set, into a
namespace of that name; FASTPPO_KERNEL declares the copies and FASTPPO_PICK returns the one this processor runs.

  FASTPPO_KERNEL(gae_rows, const GaeArgs& args, int64_t begin, int64_t end);   // in vec/gae.h
  namespace fastppo::CPU_CAPABILITY { void gae_rows(...) {...} }               // in vec/gae.cpp
  auto* rows = FASTPPO_PICK(gae_rows);                                         // in gae.cpp
*/
#pragma once

#include <string>

namespace fastppo {

enum class Capability { kDefault, kAvx2, kAvx512 };

// The set in use: the best that this processor runs, or the one that the environment variable
// FASTPPO_CPU_CAPABILITY=default|avx2|avx512 asks for. Chosen once.
Capability active_capability();

// Empty, or why the environment variable cannot be honoured. The Python module raises it at import.
const std::string& capability_error();

const char* capability_name(Capability capability);

} // namespace fastppo

#define FASTPPO_KERNEL(name, ...)               \
  namespace fastppo {                           \
  namespace DEFAULT { void name(__VA_ARGS__); } \
  namespace AVX2 { void name(__VA_ARGS__); }    \
  namespace AVX512 { void name(__VA_ARGS__); }  \
  }                                             \
  static_assert(true, "ask for a semicolon")

#if defined(__x86_64__)
#define FASTPPO_PICK(name)                                                                     \
  (::fastppo::active_capability() == ::fastppo::Capability::kAvx512 ? &::fastppo::AVX512::name \
   : ::fastppo::active_capability() == ::fastppo::Capability::kAvx2 ? &::fastppo::AVX2::name   \
                                                                    : &::fastppo::DEFAULT::name)
#else
#define FASTPPO_PICK(name) (&::fastppo::DEFAULT::name)
#endif
