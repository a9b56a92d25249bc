// Tiles (Intel AMX): 16 rows of 64 bytes, whose BF16 products are summed in FP32.
#pragma once

#include "bf16.h"

#if defined(ADDBENCH_BF16) && defined(__AMX_BF16__) && defined(__linux__)
#define ADDBENCH_AMX

#include <sys/syscall.h>
#include <unistd.h>

constexpr int kTile = 1024;  // bytes

// Whether Linux lets this process use them: it must be asked, once.
inline bool may_use_tiles() {
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  return allowed;
}

// Eight whole tiles, for as long as this lives; others on the same thread set their own.
class Tiles {
 public:
  Tiles() {
    struct __attribute__((packed)) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    _tile_loadconfig(&layout);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// Sums of 32 rows (16, unless `two`) and 32 columns are in tiles 0 and 1, 2 and 3.
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
inline void load_sums(const float* from, int64_t stride, bool two) {
  _tile_loadd(0, from, stride);
  _tile_loadd(1, from + 16, stride);
  if (two) {
    _tile_loadd(2, from + 4 * stride, stride);
    _tile_loadd(3, from + 4 * stride + 16, stride);
  }
}
inline void store_sums(float* to, int64_t stride, bool two) {
  _tile_stored(0, to, stride);
  _tile_stored(1, to + 16, stride);
  if (two) {
    _tile_stored(2, to + 4 * stride, stride);
    _tile_stored(3, to + 4 * stride + 16, stride);
  }
}

#endif
