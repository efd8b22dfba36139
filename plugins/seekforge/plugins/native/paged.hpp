// Rows of a paged cache.
#pragma once

#include "op.hpp"

namespace seekforge {

// The cache of one kind and layer, [NB · 64, width], and which blocks a sequence has of it.
class PagedRows {
  public:
    // Every entry of the tables is checked here, so that `row` need not.
    PagedRows(const Tensor& cache, const Tensor& block_table)
        : data_(cache.f32()), width_(cache.size(1)), table_(block_table.as<int32_t>()), blocks_(block_table.size(1)) {
        const int64_t num_blocks = cache.size(0) / kBlockSize;
        for (int64_t i = 0; i < block_table.count(); ++i) {
            require(table_[i] >= 0 && table_[i] < num_blocks, "block_table names a block that the cache has not");
        }
    }
    int64_t width() const { return width_; }
    int64_t positions() const { return blocks_ * kBlockSize; }
    const float* row(int64_t sequence, int64_t position) const {
        const int64_t block = table_[sequence * blocks_ + position / kBlockSize];
        return data_ + (block * kBlockSize + position % kBlockSize) * width_;
    }

  private:
    const float* data_;
    int64_t width_;
    const int32_t* table_;
    int64_t blocks_;
};

// Writes [tokens, width] rows at `slots`; −1 goes to slot 0, which is scrap.
inline void check_slots(const Tensor& slots, int64_t num_slots) {
    for (int64_t i = 0; i < slots.count(); ++i) {
        require(num_slots > 0 && slots.as<int64_t>()[i] < num_slots, "slot_mapping names a slot that the cache has not");
    }
}
inline float* slot_row(const Tensor& cache, const Tensor& slots, int64_t token) {
    const int64_t slot = slots.as<int64_t>()[token];
    return cache.f32() + (slot < 0 ? 0 : slot) * cache.size(1);
}

}  // namespace seekforge
