// How decode cuts a context: into parts, a part into a span for each block of a cluster. By the context
// alone.
#pragma once

#include "kernels/attention/cuda.h"
#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

inline constexpr int kHeads = 8;      // query heads of a block, and its warps
inline constexpr int kTileKeys = 16;  // of one product
// Tiles of a block's span: 64 keys, which are there when the queries are, in each of several parts; up to
// twice as many where that saves a second part, which costs as much as 64 keys.
inline constexpr int kSpanTiles = 4;

__host__ __device__ inline int head_groups(const AttentionShape& shape) {
  return (shape.query_heads / shape.key_heads + kHeads - 1) / kHeads;
}

__host__ __device__ inline int tiles_of(int keys) { return (keys + kTileKeys - 1) / kTileKeys; }

__host__ __device__ inline int count_parts(int tiles, int cluster, int limit) {
  const int of_part = kSpanTiles * cluster;
  if (tiles <= 2 * of_part) return 1;
  const int parts = (tiles + of_part - 1) / of_part;
  return parts < limit ? parts : limit;
}

struct Cut {
  int tiles;  // of the context
  int tiles_of_part;
  int tiles_of_span;
  int parts;

  __device__ __forceinline__ Cut(int position, int cluster, int limit) : tiles(tiles_of(position + 1)) {
    const int wanted = count_parts(tiles, cluster, limit);
    tiles_of_part = (tiles + wanted - 1) / wanted;
    tiles_of_span = (tiles_of_part + cluster - 1) / cluster;
    parts = (tiles + tiles_of_part - 1) / tiles_of_part;
  }
};

// A block's keys of a part; there may be none.
struct Span {
  int begin;
  int end;

  __device__ __forceinline__ Span(const Cut& cut, int part, int rank, int position) {
    const int part_end = min((part + 1) * cut.tiles_of_part, cut.tiles);
    const int first = part * cut.tiles_of_part + rank * cut.tiles_of_span;
    begin = first * kTileKeys;
    end = min(min(first + cut.tiles_of_span, part_end) * kTileKeys, position + 1);
  }
};

}  // namespace qwen::cuda
