// Momentum in 8 bits, shared by CPU and CUDA. Documented in torchlars/codes.py, which has the same in plain torch.
//
// A row is all elements of one index of dimension 0, and lies in memory without gaps. It is cut into blocks, and the
// momentum of an element is its code times the scale of its block.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "plan.h"

namespace torchlars {

constexpr int kBlock = 128;  // elements; the last block of a row may have fewer
constexpr int kMaxCode = 127;
constexpr int64_t kMaxDims = 10;       // of which state dicts can hold the order in memory
constexpr int64_t kMinRowLength = 64;  // with fewer elements a row would take more than 1/16 byte an element for scales

// A block of a layer.
struct Block {
  int64_t index;      // of its scale
  int64_t begin;      // its first element
  int count;          // of its elements
  uint32_t position;  // that of its first element in the whole layer, modulo 2^32
};

// How a layer is cut into blocks. It may be a shard of a whole layer, whose first element is at `offset`.
struct Rows {
  int64_t row_length = 1;  // of the rows here; a shard may have a part of each
  uint32_t whole_row_length = 1;
  uint32_t offset = 0;

  C10_HOST_DEVICE int64_t blocks_per_row() const { return divide_up(row_length, kBlock); }

  // The first block that begins at an element or later: a block belongs to the chunk in which it begins.
  C10_HOST_DEVICE int64_t first_block_from(int64_t element) const {
    return element / row_length * blocks_per_row() + divide_up(element % row_length, kBlock);
  }

  C10_HOST_DEVICE Block block(int64_t row, int64_t in_row) const {
    const int64_t begin = in_row * kBlock;
    const int64_t left = row_length - begin;
    return {row * blocks_per_row() + in_row, row * row_length + begin, left < kBlock ? static_cast<int>(left) : kBlock,
            offset + static_cast<uint32_t>(row) * whole_row_length + static_cast<uint32_t>(begin)};
  }

  // Calls visit(block) for every step-th block of a range of elements, from the first-th on.
  template <typename Visit>
  C10_HOST_DEVICE void for_blocks(Range range, int first, int step, const Visit& visit) const {
    const int64_t per_row = blocks_per_row(), end = first_block_from(range.end);
    int64_t index = first_block_from(range.begin) + first;
    int64_t row = index / per_row, in_row = index % per_row;
    for (; index < end; index += step) {
      visit(block(row, in_row));
      for (in_row += step; in_row >= per_row; in_row -= per_row) {
        ++row;
      }
    }
  }
};

C10_HOST_DEVICE C10_ALWAYS_INLINE uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

// The bits of |number|, whose order as integers is that of the numbers, infinity and NaN last.
C10_HOST_DEVICE C10_ALWAYS_INLINE uint32_t magnitude(float number) { return bits_of(number) & 0x7fffffffu; }

// How the numbers of a block are coded, given the largest of their magnitudes.
struct Scale {
  C10_HOST_DEVICE explicit Scale(uint32_t largest) {
    constexpr uint32_t kInfinity = 0x7f800000u, kLeast = 0x0d800000u;  // 2^-100
    float number;
    std::memcpy(&number, &largest, sizeof number);
    if (largest >= kInfinity) {
      scale = std::numeric_limits<float>::quiet_NaN();  // a fault is seen, not erased
    } else if (largest >= kLeast) {
      scale = number / kMaxCode;
      inverse = kMaxCode / number;
    }
  }

  float scale = 0;
  float inverse = 0;  // 0: all codes are 0
};

// A pseudo-random number in [0, 1) of an element, by which its code is rounded without bias. A hash of numbers that
// every replica and every run has: no state, no generator. salt: salt_of(the parameter before the step, the element's
// index in its block) + salt_of(block, largest).
C10_HOST_DEVICE C10_ALWAYS_INLINE float dither(float momentum, uint32_t salt) {
  uint32_t hash = bits_of(momentum) * 0x9E3779B1u ^ salt;
  hash ^= hash >> 16;
  hash *= 0x7FEB352Du;
  hash ^= hash >> 15;
  hash *= 0x846CA68Bu;
  hash ^= hash >> 16;
  return static_cast<float>(static_cast<int32_t>(hash >> 8)) * 0x1p-24f;
}

C10_HOST_DEVICE C10_ALWAYS_INLINE uint32_t salt_of(float param, int in_block) {
  return bits_of(param) + static_cast<uint32_t>(in_block) * 0x7F4A7C15u;
}

C10_HOST_DEVICE C10_ALWAYS_INLINE uint32_t salt_of(uint32_t position, uint32_t largest) {
  return position * 0x7F4A7C15u + largest * 0xC2B2AE3Du;
}

C10_HOST_DEVICE C10_ALWAYS_INLINE int8_t code_of(float momentum, uint32_t salt, float inverse) {
  // |momentum * inverse| is at most 127.00001. In 16 bits, as a vector holds twice as many of these.
  auto code = static_cast<int16_t>(static_cast<int32_t>(std::floor(momentum * inverse + dither(momentum, salt))));
  code = code > kMaxCode ? kMaxCode : code;
  code = code < -kMaxCode ? -kMaxCode : code;
  return static_cast<int8_t>(code);
}

}  // namespace torchlars
