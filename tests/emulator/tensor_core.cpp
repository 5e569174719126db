// Matrix instructions of warps: ldmatrix, stmatrix, mma.sync.m16n8k16. A matrix of ldmatrix and stmatrix has 8 rows of
// 8 16-bit elements.
#include <cstring>

#include "emulator/half.h"
#include "emulator/machine.h"

namespace emulator {

void take_part(WarpOp op, uint32_t mask, uintptr_t pc);  // warp.cpp

namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
void move_matrices(Block& block, uint32_t warp, const Collective& collective) {
  Thread* const lanes = &block.threads[warp * 32];
  const bool loads = collective.op == WarpOp::kLoadMatrix, transposed = lanes[0].width != 0;
  for (int matrix = 0; matrix < lanes[0].argument; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      uint16_t* elements = reinterpret_cast<uint16_t*>(block.arena + lanes[8 * matrix + row].value);
      for (int column = 0; column < 8; ++column) {
        const int major = transposed ? column : row, minor = transposed ? row : column;
        Thread& owner = lanes[4 * major + minor / 2];
        uint16_t* halves = reinterpret_cast<uint16_t*>(
            const_cast<uint32_t*>(static_cast<const uint32_t*>(owner.operands[0]) + matrix));
        if (loads) {
          halves[minor % 2] = elements[column];
        } else {
          elements[column] = halves[minor % 2];
        }
      }
    }
  }
}

float value_of(uint32_t packed, int half, bool is_f16) {
  const uint16_t bits = static_cast<uint16_t>(packed >> (16 * half));
  return is_f16 ? f16_value(bits) : bf16_value(bits);
}

// D[16, 8] += A[16, 16] B[16, 8] with the fragments of the PTX manual: g = lane / 4 and q = lane % 4 say the row or the
// column group and the pair.
void multiply_fragments(Block& block, uint32_t warp) {
  Thread* const lanes = &block.threads[warp * 32];
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Thread& thread = lanes[lane];
    const float* c = static_cast<const float*>(thread.operands[0]);
    const uint32_t* ra = static_cast<const uint32_t*>(thread.operands[1]);
    const uint32_t* rb = static_cast<const uint32_t*>(thread.operands[2]);
    const int g = lane / 4, q = lane % 4;
    const bool is_f16 = thread.argument != 0;
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < 2; ++h) a[g + 8 * (r % 2)][2 * q + h + 8 * (r / 2)] = value_of(ra[r], h, is_f16);
      d[g + 8 * (r / 2)][2 * q + r % 2] = c[r];
    }
    for (int r = 0; r < 2; ++r) {
      for (int h = 0; h < 2; ++h) b[2 * q + h + 8 * r][g] = value_of(rb[r], h, is_f16);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<float*>(const_cast<void*>(lanes[lane].operands[0]));
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; ++r) c[r] = d[g + 8 * (r / 2)][2 * q + r % 2];
  }
}

void matrix_rows(WarpOp op, const uint32_t* registers, uint32_t address, int matrices, bool transposed, uintptr_t pc) {
  Thread& self = *current;
  const bool loads = op == WarpOp::kLoadMatrix;
  if (!loads) require_sm90("stmatrix", pc);
  if (static_cast<int>(self.number % 32) < 8 * matrices) {
    require_shared(*self.block, address, 16, 16, loads ? "ldmatrix" : "stmatrix", pc);
    const AccessKind kind = loads ? AccessKind::kRead : AccessKind::kWrite;
    check_shared(*self.block, address, 16, self_actor(self), kind, pc);
  }
  self.value = address;
  self.argument = matrices;
  self.width = transposed;
  self.operands[0] = registers;
  take_part(op, kAllLanes, pc);
}

}  // namespace

void finish_matrix(Block& block, uint32_t warp, const Collective& collective) {
  if (collective.arrived != kAllLanes) fail("a matrix instruction needs all lanes of the warp", collective.pc);
  if (collective.op == WarpOp::kMultiply) {
    multiply_fragments(block, warp);
  } else {
    move_matrices(block, warp, collective);
  }
}

void load_matrix(uint32_t* registers, uint32_t address, int matrices, bool transposed) {
  matrix_rows(WarpOp::kLoadMatrix, registers, address, matrices, transposed, EMULATOR_CALLER);
}

void store_matrix(const uint32_t* registers, uint32_t address, int matrices, bool transposed) {
  matrix_rows(WarpOp::kStoreMatrix, registers, address, matrices, transposed, EMULATOR_CALLER);
}

void multiply(float* d, const uint32_t* a, const uint32_t* b, bool half) {
  Thread& self = *current;
  self.operands[0] = d;
  self.operands[1] = a;
  self.operands[2] = b;
  self.argument = half;
  take_part(WarpOp::kMultiply, kAllLanes, EMULATOR_CALLER);
}

}  // namespace emulator
