// The rows of a decode step in shared memory, laid out for the tensor cores (gemv.cuh), and how they get
// there.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

// The rows of x in shared memory. A lane (r, q) of the product wants, of every 32 columns, the pairs at 2q,
// 2q + 8, 2q + 16 and 2q + 24 of row r: they are 16 consecutive bytes, the four q's of 64 columns rotated by
// the index of the 64, so that neither these reads nor the writes, 8 columns a thread, meet in a bank.
struct Activations {
  unsigned char* x;  // [rows, row_bytes]
  float4* sums;      // [K / G, 4]: of the rows 2q and 2q + 1, twice: -136 times the sum of the group
  int row_bytes;

  __host__ __device__ static int bytes_of_row(int column_tiles) { return 128 * column_tiles + 64; }
  __host__ __device__ static int bytes_of_sums(int column_tiles, int group) {
    return 64 * (column_tiles * 64 / group);
  }

  // Where pair i (columns 8 chunk + 2i) of a row is.
  __device__ __forceinline__ uint32_t* pair(int row, int chunk, int i) const {
    const int block = chunk / 8;
    return reinterpret_cast<uint32_t*>(x + row * row_bytes + block * 128 + chunk / 4 % 2 * 64 +
                                       ((i + block) & 3) * 16 + chunk % 4 * 4);
  }
};

__device__ __forceinline__ float sum_of_eight(const uint4& v) {
  return ((low_bf16(v.x) + high_bf16(v.x)) + (low_bf16(v.y) + high_bf16(v.y))) +
         ((low_bf16(v.z) + high_bf16(v.z)) + (low_bf16(v.w) + high_bf16(v.w)));
}

// Columns 8 chunk..8 chunk + 7 of a row, and their share of its group's sum. Called by whole warps whose
// lanes have consecutive chunks, the first a multiple of 32; writes where `valid`.
template <int kGroup>
__device__ __forceinline__ void store_columns(const Activations& to, int row, int chunk, const uint4& v,
                                              bool valid) {
  float sum = sum_of_eight(v);
#pragma unroll
  for (int offset = 1; offset < kGroup / 8; offset *= 2) sum += __shfl_xor_sync(~0U, sum, offset);
  if (!valid) return;
  *to.pair(row, chunk, 0) = v.x;
  *to.pair(row, chunk, 1) = v.y;
  *to.pair(row, chunk, 2) = v.z;
  *to.pair(row, chunk, 3) = v.w;
  const int member = chunk % (kGroup / 8);
  if (member < 2) {
    float* sums = reinterpret_cast<float*>(to.sums + chunk / (kGroup / 8) * 4 + row / 2);
    sums[row % 2 + 2 * member] = -136.0F * sum;
  }
}

constexpr int kRowsAtOnce = 4;  // whose loads are in flight together

// Columns 8 chunk..8 chunk + 7 of the rows from `first` on of x [rows, k]; zeros where there are none.
__device__ __forceinline__ void read_columns(uint4 (&v)[kRowsAtOnce], const bf16* x, int first, int rows,
                                             int k, int chunk) {
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    v[i] = make_uint4(0, 0, 0, 0);
    if (first + i < rows && chunk < k / 8) {
      v[i] = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(first + i) * k)[chunk];
    }
  }
}

// The rows x [rows, k] into `to`, zeros up to whole tiles. Ends with a barrier.
template <int kGroup>
__device__ void load_rows(const Activations& to, const bf16* x, int rows, int k) {
  const int chunks = (k + 63) / 64 * 8;
#pragma unroll 1
  for (int first = 0; first < rows; first += kRowsAtOnce) {
#pragma unroll 1
    for (int base = 0; base < chunks; base += static_cast<int>(blockDim.x)) {
      const int chunk = base + static_cast<int>(threadIdx.x);
      uint4 v[kRowsAtOnce];
      read_columns(v, x, first, rows, k, chunk);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (first + i < rows) store_columns<kGroup>(to, first + i, chunk, v[i], chunk < chunks);
      }
    }
  }
  __syncthreads();
}

// A norm's weights into shared memory [k], as one group of copies; each thread copies what it will read.
__device__ __forceinline__ void copy_norm_weights(unsigned char* to, const RmsNorm& norm, int k) {
  if (norm.weight != nullptr) {
#pragma unroll 1
    for (int chunk = static_cast<int>(threadIdx.x); chunk < k / 8; chunk += static_cast<int>(blockDim.x)) {
      copy_async_16(to + chunk * 16, norm.weight + chunk * 8);
    }
  }
  copy_async_commit();
}

__device__ __forceinline__ uint32_t normed_pair(uint32_t x, uint32_t weight, float scale) {
  return pack_bf16(low_bf16(x) * scale * (1.0F + low_bf16(weight)),
                   high_bf16(x) * scale * (1.0F + high_bf16(weight)));
}

// norm(x) into `to`, as load_rows. `weights` is what copy_norm_weights fills, kLaterCopies groups of copies
// ago; `partial` has kMaxDecodeRows floats a warp.
template <int kGroup, int kLaterCopies>
__device__ void load_normed_rows(const Activations& to, const bf16* x, const RmsNorm& norm,
                                 const unsigned char* weights, float* partial, int rows, int k) {
  if (norm.weight == nullptr) {
    load_rows<kGroup>(to, x, rows, k);
    return;
  }
  const int threads = static_cast<int>(blockDim.x);
  const int warps = threads / 32;
  const int thread = static_cast<int>(threadIdx.x);
  const int chunks = (k + 63) / 64 * 8;
#pragma unroll 1
  for (int first = 0; first < rows; first += kRowsAtOnce) {
    float squares[kRowsAtOnce] = {};
#pragma unroll 1
    for (int chunk = thread; chunk < chunks; chunk += threads) {
      uint4 v[kRowsAtOnce];
      read_columns(v, x, first, rows, k, chunk);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (first + i >= rows) break;
        const uint32_t words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          *to.pair(first + i, chunk, j) = words[j];  // read again below, by this thread
          squares[i] += low_bf16(words[j]) * low_bf16(words[j]);
          squares[i] += high_bf16(words[j]) * high_bf16(words[j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (first + i >= rows) break;
      const float sum = warp_sum(squares[i]);
      if (thread % 32 == 0) partial[(first + i) * warps + thread / 32] = sum;
    }
  }
  copy_async_wait<kLaterCopies>();
  __syncthreads();
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    float sum = 0;
    for (int i = 0; i < warps; ++i) sum += partial[row * warps + i];
    const float scale = rsqrtf(sum / static_cast<float>(k) + norm.eps);
#pragma unroll 1
    for (int base = 0; base < chunks; base += threads) {
      const int chunk = base + thread;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (chunk < k / 8) {
        const uint4 weight = *reinterpret_cast<const uint4*>(weights + chunk * 16);
        v.x = normed_pair(*to.pair(row, chunk, 0), weight.x, scale);
        v.y = normed_pair(*to.pair(row, chunk, 1), weight.y, scale);
        v.z = normed_pair(*to.pair(row, chunk, 2), weight.z, scale);
        v.w = normed_pair(*to.pair(row, chunk, 3), weight.w, scale);
      }
      store_columns<kGroup>(to, row, chunk, v, chunk < chunks);
    }
  }
  __syncthreads();
}

// The product of a bfloat16 row [k] in shared memory, of which each lane has copied the chunks lane, lane +
// 32, .., with each of the rows of x: take(row, sum), in all lanes.
template <typename Take>
__device__ __forceinline__ void dot_rows(const Activations& x, const unsigned char* weights, int rows, int k,
                                         const Take& take) {
  float sums[kMaxDecodeRows] = {};
#pragma unroll 2
  for (int chunk = static_cast<int>(threadIdx.x) % 32; chunk < k / 8; chunk += 32) {
    const uint4 v = *reinterpret_cast<const uint4*>(weights + chunk * 16);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int row = 0; row < kMaxDecodeRows; ++row) {
      if (row >= rows) break;
      float products[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = *x.pair(row, chunk, i);
        products[i] = low_bf16(words[i]) * low_bf16(pair) + high_bf16(words[i]) * high_bf16(pair);
      }
      sums[row] += (products[0] + products[1]) + (products[2] + products[3]);
    }
  }
#pragma unroll
  for (int row = 0; row < kMaxDecodeRows; ++row) {
    if (row < rows) take(row, warp_sum(sums[row]));
  }
}

}  // namespace qwen::cuda
