// What every CPU kernel shares: element types, read-only arrays and status codes.
//
// The kernels know pointers and sizes, no framework. Arrays are dense and row-major unless a header says
// otherwise; an output never overlaps an input. A kernel returns kOk or a code below, never throws, and on
// kOutOfRange has touched nothing. Any number of threads may call kernels at once, on outputs and states that
// do not overlap.
//
// A token's result depends neither on how many tokens are in the call nor on the number of threads, bit for
// bit, so that prefill in chunks, as a whole and token by token agree exactly on one machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace qwen::cpu {

enum class DType { kFloat32, kBFloat16 };

// A read-only array; its size is told beside it.
struct Array {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

inline constexpr int kOk = 0;
inline constexpr int kBadShape = 1;     // sizes that contradict each other, or that the kernel cannot take
inline constexpr int kOutOfRange = 2;   // a token, expert, slot or position that does not exist
inline constexpr int kOutOfMemory = 3;  // no memory for scratch

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return static_cast<uint16_t>(bits >> 16 | 0x40u);
  }
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace qwen::cpu
