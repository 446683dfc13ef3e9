#include "device_arena.h"

#include <algorithm>
#include <utility>

namespace qwen {
namespace {

// What kernels' vector loads and CUDA's own allocations are aligned to.
constexpr size_t kAlignment = 256;
// CUDA hands out memory in pieces of this size.
constexpr size_t kRegionUnit = size_t{2} << 20;

size_t round_up(size_t bytes, size_t unit) { return (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit; }

}  // namespace

DeviceArena::DeviceArena(Device& device, const char* what) : device_(device), what_(what) {}
DeviceArena::~DeviceArena() = default;

void* DeviceArena::allocate(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t rounded = round_up(bytes, kAlignment);
  void* data = take(rounded);
  if (data == nullptr && add_region(rounded)) data = take(rounded);
  if (data == nullptr) return nullptr;
  live_ += rounded;
  peak_ = std::max(peak_, live_);
  return data;
}

// The smallest free segment that fits; the first of its size.
void* DeviceArena::take(size_t bytes) {
  Region* region = nullptr;
  size_t best = 0;
  for (Region& candidate : regions_) {
    for (size_t i = 0; i < candidate.segments.size(); ++i) {
      const Segment& segment = candidate.segments[i];
      if (!segment.free || segment.bytes < bytes) continue;
      if (region == nullptr || segment.bytes < region->segments[best].bytes) {
        region = &candidate;
        best = i;
      }
    }
  }
  if (region == nullptr) return nullptr;
  Segment& segment = region->segments[best];
  const size_t offset = segment.offset;
  const size_t rest = segment.bytes - bytes;
  segment.bytes = bytes;
  segment.free = false;
  if (rest > 0) {
    region->segments.insert(region->segments.begin() + static_cast<ptrdiff_t>(best) + 1,
                            {offset + bytes, rest, true});
  }
  return region->memory.data() + offset;
}

bool DeviceArena::add_region(size_t bytes) {
  const size_t size = round_up(bytes, kRegionUnit);
  auto memory = DeviceBuffer::make(device_, size, what_);
  if (!memory.ok() && !fixed_ && drop_empty_regions()) {
    memory = DeviceBuffer::make(device_, size, what_);
  }
  if (!memory.ok()) {
    error_ = memory.error();
    return false;
  }
  Region region{std::move(*memory), {}};
  region.segments.push_back({0, size, true});
  regions_.push_back(std::move(region));
  capacity_ += size;
  ++changes_;
  return true;
}

void DeviceArena::release(void* data, size_t bytes) {
  const auto* address = static_cast<const std::byte*>(data);
  const auto region = std::ranges::find_if(regions_, [address](const Region& candidate) {
    return address >= candidate.memory.data() && address < candidate.memory.data() + candidate.memory.size();
  });
  if (region == regions_.end()) return;
  std::vector<Segment>& segments = region->segments;
  const auto offset = static_cast<size_t>(address - region->memory.data());
  auto segment = std::ranges::lower_bound(segments, offset, {}, &Segment::offset);
  segment->free = true;
  live_ -= round_up(bytes, kAlignment);
  if (const auto next = segment + 1; next != segments.end() && next->free) {
    segment->bytes += next->bytes;
    segment = segments.erase(next) - 1;
  }
  if (segment != segments.begin() && (segment - 1)->free) {
    (segment - 1)->bytes += segment->bytes;
    segments.erase(segment);
  }
}

void DeviceArena::begin_run() {
  // Some fragments are the price of cutting blocks from few regions; a quarter more than was in use is left
  // alone.
  if (fixed_ || live_ != 0 || regions_.size() < 2 || capacity_ <= std::max(peak_ + peak_ / 4, settled_))
    return;
  // Where a region of the peak was too small before, it takes all that the run ended with.
  const uint64_t size = joined_peak_ == peak_ ? capacity_ : peak_;
  joined_peak_ = peak_;
  settled_ = size;
  drop_empty_regions();
  add_region(size);
  error_.reset();  // without it the run asks for what it needs
}

void DeviceArena::trim() {
  if (!fixed_) drop_empty_regions();
}

bool DeviceArena::drop_empty_regions() {
  const size_t dropped = std::erase_if(regions_, [this](const Region& region) {
    const bool empty = region.segments.size() == 1 && region.segments.front().free;
    if (empty) capacity_ -= region.memory.size();
    return empty;
  });
  changes_ += dropped;
  return dropped > 0;
}

std::optional<Error> DeviceArena::take_error() { return std::exchange(error_, std::nullopt); }

}  // namespace qwen
