// How the kernels of the training step walk through many tensors in one launch: a row per parameter, cut into chunks of
// entries, a chunk for a block of threads.
//
// Here is what hosts can run as well (tests/cuda_rows.cpp does); what needs a device is in steps.cuh.
#pragma once

#include "arithmetic.h"

// On devices arrays must be registers, whose numbers are known when compiling.
#ifdef __CUDA_ARCH__
#define MAS_FAST_UNROLL _Pragma("unroll")
#else
#define MAS_FAST_UNROLL
#endif

namespace mas_fast::cuda {

// Where a tensor of a parameter stands in its row.
enum Place : int { kTheta, kGrad, kOmega, kAnchor, kState0, kState1, kState2, kPlaces };

constexpr unsigned mask_of(Place place) { return 1u << place; }

// Entries of a chunk: four groups for each thread in float32. Chunks start on the blocks of encoded Ω.
constexpr int64_t kChunk = 8192;
constexpr int kThreads = 256;
static_assert(kChunk % kCodeBlock == 0);

// Entries that a thread takes at once: 16 bytes of T.
template <class T>
constexpr int kGroup = 16 / int(sizeof(T));

// The tensors of a parameter, as a device sees them. Rows are compared byte by byte, so that nothing is left unset.
struct Row {
  char* data[kPlaces] = {};  // null where there is none
  const float* scales = nullptr;
  int64_t count = 0;
  int64_t first_chunk = 0;
  uint8_t storage[kPlaces] = {};  // Storage
  uint8_t present = 0;            // mask of places with data
  uint8_t wide = 0;               // arithmetic in double, because a tensor is
  uint8_t aligned = 0;            // groups may be loaded at once
  uint8_t unused[6] = {};

  MAS_FAST_BOTH Storage kept(int place) const { return Storage(storage[place]); }
  MAS_FAST_BOTH bool has(int place) const { return present >> place & 1; }
};
static_assert(sizeof(Row) == 8 * (kPlaces + 3) + kPlaces + 9);

// What changes from step to step, by parameter.
struct Numbers {
  double lam;
  double rate, root_correction;  // of AdamW, where they are not the same for all
};

MAS_FAST_BOTH char* address(const Row& row, int place, int64_t entry) {
  return row.data[place] + entry * bytes_of(row.kept(place));
}

// Fills in what follows from the pointers, their storage and the counts; returns the number of chunks.
inline int64_t settle(Row* rows, int64_t count) {
  int64_t chunks = 0;
  for (Row* row = rows; row != rows + count; ++row) {
    row->present = row->wide = 0;
    row->aligned = 1;
    for (int place = 0; place < kPlaces; ++place) {
      if (!row->data[place]) continue;
      row->present = uint8_t(row->present | 1u << place);
      if (row->kept(place) == Storage::kFloat64) row->wide = 1;
    }
    for (int place = 0; place < kPlaces; ++place) {
      const uint64_t bytes = uint64_t(bytes_of(row->kept(place)) * (row->wide ? kGroup<double> : kGroup<float>));
      if (reinterpret_cast<uintptr_t>(row->data[place]) % bytes != 0) row->aligned = 0;
    }
    row->first_chunk = chunks;
    chunks += (row->count + kChunk - 1) / kChunk;
  }
  return chunks;
}

// The row of a chunk: the last one that starts there or before; rows without chunks start with their successor.
MAS_FAST_BOTH int64_t row_of(const Row* rows, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (rows[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// V entries as memory keeps them. Loading is apart from decoding, so that the loads of all tensors are under way
// together: a branch on the storage type does not wait for memory, using what was loaded does.
struct alignas(16) Bits {
  uint32_t word[4];
};

template <int BYTES>
struct WordOf;
template <>
struct WordOf<1> {
  using Type = uint8_t;
};
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};

template <int BYTES>
MAS_FAST_BOTH void copy_in(const char* from, Bits& bits) {
#ifdef __CUDA_ARCH__
  // The compiler cannot see where a pointer from a table leads.
  __builtin_assume(__isGlobal(from));
  if constexpr (BYTES == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    bits.word[0] = words.x;
    bits.word[1] = words.y;
    bits.word[2] = words.z;
    bits.word[3] = words.w;
  } else if constexpr (BYTES == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    bits.word[0] = words.x;
    bits.word[1] = words.y;
  } else {
    bits.word[0] = *reinterpret_cast<const typename WordOf<BYTES>::Type*>(from);
  }
#else
  // A device would end here, too.
  if (reinterpret_cast<uintptr_t>(from) % BYTES != 0) __builtin_trap();
  __builtin_memcpy(&bits, from, BYTES);
#endif
}

template <int BYTES>
MAS_FAST_BOTH void copy_out(const Bits& bits, char* to) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(to));
  if constexpr (BYTES == 16) {
    *reinterpret_cast<uint4*>(to) = make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]);
  } else if constexpr (BYTES == 8) {
    *reinterpret_cast<uint2*>(to) = make_uint2(bits.word[0], bits.word[1]);
  } else {
    using Word = typename WordOf<BYTES>::Type;
    *reinterpret_cast<Word*>(to) = Word(bits.word[0]);
  }
#else
  __builtin_memcpy(to, &bits, BYTES);
#endif
}

// A row with a float64 tensor is walked in double: floats never meet float64 in memory.
template <class T, int V>
MAS_FAST_BOTH void load(Storage storage, const char* from, Bits& bits) {
  switch (storage) {
    case Storage::kFloat64:
      if constexpr (sizeof(T) == 8) copy_in<8 * V>(from, bits);
      break;
    case Storage::kFloat32:
      copy_in<4 * V>(from, bits);
      break;
    case Storage::kCode:
      copy_in<V>(from, bits);
      break;
    default:
      copy_in<2 * V>(from, bits);
  }
}

template <class T, int V>
MAS_FAST_BOTH void store(Storage storage, const Bits& bits, char* to) {
  switch (storage) {
    case Storage::kFloat64:
      if constexpr (sizeof(T) == 8) copy_out<8 * V>(bits, to);
      break;
    case Storage::kFloat32:
      copy_out<4 * V>(bits, to);
      break;
    default:
      copy_out<2 * V>(bits, to);
  }
}

template <class T, int V>
MAS_FAST_BOTH void decode(Storage storage, const Bits& bits, float scale, T (&values)[V]) {
  switch (storage) {
    case Storage::kFloat64:
      if constexpr (sizeof(T) == 8) {
        MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
          values[k] = bits_of<double>(uint64_t(bits.word[2 * k + 1]) << 32 | bits.word[2 * k]);
        }
      }
      break;
    case Storage::kFloat32:
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) values[k] = T(bits_of<float>(bits.word[k]));
      break;
    case Storage::kBFloat16:
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
        values[k] = T(from_bfloat16(uint16_t(bits.word[k / 2] >> 16 * (k % 2))));
      }
      break;
    case Storage::kFloat16:
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
        values[k] = T(from_float16(uint16_t(bits.word[k / 2] >> 16 * (k % 2))));
      }
      break;
    default:
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) values[k] = T(from_code(uint8_t(bits.word[0] >> 8 * k), scale));
  }
}

template <class T, int V>
MAS_FAST_BOTH void encode(Storage storage, const T (&values)[V], Bits& bits) {
  switch (storage) {
    case Storage::kFloat64:
      if constexpr (sizeof(T) == 8) {
        MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
          const uint64_t both = bits_of<uint64_t>(double(values[k]));
          bits.word[2 * k] = uint32_t(both);
          bits.word[2 * k + 1] = uint32_t(both >> 32);
        }
      }
      break;
    case Storage::kFloat32:
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) bits.word[k] = bits_of<uint32_t>(float(values[k]));
      break;
    default:
      bits.word[0] = bits.word[1] = 0;
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
        const float value = float(values[k]);
        const uint32_t half = storage == Storage::kBFloat16 ? to_bfloat16(value) : to_float16(value);
        bits.word[k / 2] |= half << 16 * (k % 2);
      }
  }
}

template <class T, int V>
struct Entries {
  T at[kPlaces][V];
};

// What a thread, a block or a chunk adds up: the penalty, and the entries of the gradient that it made inf or nan.
struct Sum {
  double value = 0;
  int32_t lost = 0;
};

// Applies the rule to V entries of a row. Places that the rule can never read or write compile to nothing.
template <class T, int V, class Rule>
MAS_FAST_BOTH void visit(const Rule& rule, const Row& row, int64_t entry, Sum& sum) {
  const unsigned reads = rule.reads & row.present, writes = rule.writes & row.present;
  Bits bits[kPlaces];
  float scale = 0;
  MAS_FAST_UNROLL for (int place = 0; place < kPlaces; ++place) {
    if ((Rule::kReads >> place & 1) == 0 || (reads >> place & 1) == 0) continue;
    load<T, V>(row.kept(place), address(row, place, entry), bits[place]);
    if (place == kOmega && row.kept(place) == Storage::kCode) scale = row.scales[entry / kCodeBlock];
  }
  Entries<T, V> entries;
  MAS_FAST_UNROLL for (int place = 0; place < kPlaces; ++place) {
    if ((Rule::kReads >> place & 1) == 0) continue;
    if (reads >> place & 1) {
      decode<T, V>(row.kept(place), bits[place], scale, entries.at[place]);
    } else {
      // Without an anchor, θ stands in for it: the difference is 0.
      MAS_FAST_UNROLL for (int k = 0; k < V; ++k) {
        entries.at[place][k] = place == kAnchor ? entries.at[kTheta][k] : T(0);
      }
    }
  }
  rule.step(entries, sum);
  MAS_FAST_UNROLL for (int place = 0; place < kPlaces; ++place) {
    if ((Rule::kWrites >> place & 1) == 0 || (writes >> place & 1) == 0) continue;
    Bits changed;
    encode<T, V>(row.kept(place), entries.at[place], changed);
    store<T, V>(row.kept(place), changed, address(row, place, entry));
  }
}

// The share of one of `threads` threads in a chunk of a row: groups first, then what is left or not aligned.
template <class T, class Rule>
MAS_FAST_BOTH Sum walk(const Rule& rule, const Row& row, int64_t chunk, int thread, int threads) {
  const int64_t first = (chunk - row.first_chunk) * kChunk;
  const int count = int(row.count - first < kChunk ? row.count - first : kChunk);
  const int grouped = row.aligned ? count / kGroup<T> * kGroup<T> : 0;
  Sum sum;
  for (int i = thread * kGroup<T>; i < grouped; i += threads * kGroup<T>) {
    visit<T, kGroup<T>>(rule, row, first + i, sum);
  }
  for (int i = grouped + thread; i < count; i += threads) visit<T, 1>(rule, row, first + i, sum);
  return sum;
}

}  // namespace mas_fast::cuda
