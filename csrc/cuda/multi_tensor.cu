// Host side of the multi-tensor kernels: checks, the table and its cache; and the sum over chunks.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>

#include "cuda/multi_tensor.h"

namespace mas_fast::cuda {
namespace {

using StreamGetter = AOTITorchError (*)(int32_t device, void** stream);

// Looked up when first needed: CPU builds of PyTorch have no such function and must be able to load this library.
// A weak reference would not do: PyTorch loads its libraries for themselves, where the loader finds no symbols for us.
StreamGetter find_stream_getter() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  // The second one depends on whatever library holds it.
  for (const char* library : {"libtorch_cuda.so", "libtorch_python.so"}) {
    void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) continue;
    void* const found = dlsym(handle, kName);
    dlclose(handle);
    if (found) return reinterpret_cast<StreamGetter>(found);
  }
  return reinterpret_cast<StreamGetter>(dlsym(RTLD_DEFAULT, kName));
}

// Text up to this size travels as the argument of a kernel. That needs no pinned memory that must live until the copy
// is done, does not wait, and is kept by a CUDA graph that captures it.
struct Piece {
  static constexpr int kWords = 496;
  uint64_t word[kWords];
};

__global__ void write_kernel(uint64_t* to, int words, const __grid_constant__ Piece piece) {
  for (int i = int(threadIdx.x); i < words; i += int(blockDim.x)) to[i] = piece.word[i];
}

void write(char* to, const void* from, size_t bytes, cudaStream_t stream) {
  static_assert(sizeof(Row) % 8 == 0 && sizeof(Numbers) % 8 == 0);
  for (size_t done = 0; done < bytes; done += sizeof(Piece)) {
    Piece piece;
    const size_t part = std::min(bytes - done, sizeof(Piece));
    std::memcpy(&piece, static_cast<const char*>(from) + done, part);
    write_kernel<<<1, 256, 0, stream>>>(reinterpret_cast<uint64_t*>(to + done), int(part / 8), piece);
  }
  check(cudaGetLastError(), "the upload of a table of tensors");
}

// A table that is on a device, and what was written there. One for each stream: its memory, its upload and its readers
// are then in the order of the stream.
struct Cached {
  int32_t device;
  cudaStream_t stream;
  std::vector<Row> rows;
  std::vector<Numbers> numbers;
  Tensor memory;
};

// Training steps alternate between few lists of tensors.
constexpr size_t kCacheEntries = 16;

struct Cache {
  std::mutex mutex;
  std::list<Cached> entries;  // the latest first
};

// Never destroyed: at the end of the process PyTorch's allocator may be gone before it.
Cache& cache() {
  static Cache& own = *new Cache;
  return own;
}

template <class Item>
size_t bytes_in(const std::vector<Item>& items) {
  return items.size() * sizeof(Item);
}

template <class Item>
bool same_bytes(const std::vector<Item>& left, const std::vector<Item>& right) {
  return left.size() == right.size() && std::memcmp(left.data(), right.data(), bytes_in(left)) == 0;
}

char* address_of(const Tensor& memory) { return static_cast<char*>(memory.mutable_data_ptr()); }

Tensor write_table(const Rows& rows, cudaStream_t stream) {
  const size_t bytes = bytes_in(rows.rows) + bytes_in(rows.numbers);
  Tensor memory = torch::stable::new_empty(rows.like, {int64_t(bytes)}, ScalarType::Byte);
  write(address_of(memory), rows.rows.data(), bytes_in(rows.rows), stream);
  write(address_of(memory) + bytes_in(rows.rows), rows.numbers.data(), bytes_in(rows.numbers), stream);
  return memory;
}

Tensor cached_table(const Rows& rows, const OnDevice& on) {
  Cache& own = cache();
  const std::lock_guard<std::mutex> lock(own.mutex);
  const auto found = std::find_if(own.entries.begin(), own.entries.end(), [&](const Cached& entry) {
    return entry.device == on.device && entry.stream == on.stream && same_bytes(entry.rows, rows.rows);
  });
  if (found == own.entries.end()) {
    own.entries.push_front({on.device, on.stream, rows.rows, rows.numbers, write_table(rows, on.stream)});
    if (own.entries.size() > kCacheEntries) own.entries.pop_back();
  } else {
    own.entries.splice(own.entries.begin(), own.entries, found);
    if (!same_bytes(found->numbers, rows.numbers)) {
      found->numbers = rows.numbers;
      write(address_of(found->memory) + bytes_in(rows.rows), rows.numbers.data(), bytes_in(rows.numbers), on.stream);
    }
  }
  return own.entries.front().memory;
}

// Where a device finds the entries of a tensor.
char* device_address(const char* name, const Tensor& tensor, const Tensor& like, bool may_be_pinned) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  if (tensor.numel() == 0) return nullptr;
  void* const data = const_cast<void*>(tensor.const_data_ptr());
  if (tensor.is_cuda()) {
    STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), name, " must be on GPU ",
                    like.get_device_index(), " like the first theta, got GPU ", tensor.get_device_index());
    return static_cast<char*>(data);
  }
  STD_TORCH_CHECK(tensor.is_cpu() && may_be_pinned, name, " must be on the GPU of the first theta",
                  may_be_pinned ? ", or in pinned memory" : "");
  cudaPointerAttributes attributes;
  check(cudaPointerGetAttributes(&attributes, data), "cudaPointerGetAttributes");
  STD_TORCH_CHECK(attributes.type == cudaMemoryTypeHost && attributes.devicePointer, name,
                  " must be on the GPU of the first theta or in pinned memory, got memory that the GPU cannot read; "
                  "tensor.pin_memory() makes it so");
  return static_cast<char*>(attributes.devicePointer);
}

// An entry of the lists of what holds: of one parameter, or of many.
struct HoldEntry {
  HoldEntry(const Tensor& omega, const Tensor& scales, const Tensor& anchor, const Tensor& like)
      : count(omega.numel()),
        blocks(scales.numel()),
        kept_omega(omega.scalar_type() == ScalarType::Byte ? Storage::kCode : storage_of("omegas", omega)),
        kept_anchor(storage_of("anchors", anchor)),
        omega(device_address("omegas", omega, like, true)),
        anchor(device_address("anchors", anchor, like, true)) {
    STD_TORCH_CHECK(anchor.numel() == count, "anchors must have ", count, " entries, got ", anchor.numel());
    if (kept_omega != Storage::kCode) return;
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float, "scales must be float32");
    this->scales = reinterpret_cast<const float*>(device_address("scales", scales, like, true));
  }

  int64_t count, blocks;
  Storage kept_omega, kept_anchor;
  char *omega, *anchor;
  const float* scales = nullptr;
};

const Tensor& first_of(const Tensors& thetas) {
  STD_TORCH_CHECK(!thetas.empty(), "thetas must have at least one entry");
  return thetas[0];
}

// One block for each row; its threads and then their tree add in an order that depends on nothing.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Row* rows, int64_t count, int64_t chunks, const ChunkSum* sums, double* result) {
  __shared__ ChunkSum shared[kThreads];
  const int64_t row = blockIdx.x;
  const int64_t end = row + 1 < count ? rows[row + 1].first_chunk : chunks;
  ChunkSum own{0, 0};
  for (int64_t chunk = rows[row].first_chunk + threadIdx.x; chunk < end; chunk += kThreads) {
    own.value += sums[chunk].value;
    own.lost += sums[chunk].lost;
  }
  shared[threadIdx.x] = own;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      shared[threadIdx.x].value += shared[threadIdx.x + half].value;
      shared[threadIdx.x].lost += shared[threadIdx.x + half].lost;
    }
  }
  if (threadIdx.x == 0) {
    result[2 * row] = shared[0].value;
    result[2 * row + 1] = shared[0].lost;
  }
}

}  // namespace

cudaStream_t current_stream(int32_t device) {
  static const StreamGetter get = find_stream_getter();
  STD_TORCH_CHECK(get, "torch must be a CUDA build for tensors on a GPU, got one without CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Rows::Rows(const Tensors& thetas, const Tensors& omegas, const Tensors& scales, const Tensors& anchors,
           const std::vector<double>& lams, const std::vector<int64_t>& places)
    : like(first_of(thetas)), rows(thetas.size()), numbers(thetas.size(), Numbers{0, 0, 0}) {
  check_holds(thetas.size(), omegas.size(), scales.size(), anchors.size(), lams.size(), places.size());
  STD_TORCH_CHECK(like.is_cuda(), "thetas must be on a GPU like the other tensors");
  for (size_t i = 0; i < thetas.size(); ++i) {
    rows[i].count = thetas[i].numel();
    numbers[i].lam = lams[i];
  }
  put(kTheta, "thetas", thetas);
  std::vector<HoldEntry> entries;
  entries.reserve(omegas.size());
  for (size_t i = 0; i < omegas.size(); ++i) entries.emplace_back(omegas[i], scales[i], anchors[i], like);
  for (size_t i = 0; i < thetas.size(); ++i) {
    const HoldPlace at(places, i);
    if (at.entry < 0) continue;
    STD_TORCH_CHECK(at.entry < int64_t(entries.size()), "places must name an omega, got ", at.entry);
    const HoldEntry& entry = entries[size_t(at.entry)];
    Row& row = rows[i];
    if (entry.count == 0 || row.count == 0) continue;
    STD_TORCH_CHECK(at.fits(at.first, row.count, entry.count), "omegas must have ", row.count, " entries, got ",
                    entry.count, " from ", at.first, " on");
    row.data[kOmega] = entry.omega + at.first * bytes_of(entry.kept_omega);
    row.data[kAnchor] = entry.anchor + at.first * bytes_of(entry.kept_anchor);
    row.storage[kOmega] = uint8_t(entry.kept_omega);
    row.storage[kAnchor] = uint8_t(entry.kept_anchor);
    if (entry.kept_omega == Storage::kCode) {
      STD_TORCH_CHECK(at.fits(at.block, ceil_div(row.count, kCodeBlock), entry.blocks),
                      "scales must be float32 and one for each ", kCodeBlock, " codes");
      row.scales = entry.scales + at.block;
    }
  }
}

void Rows::put(Place place, const char* name, const Tensors& tensors) {
  if (tensors.empty()) return;
  check_lists({rows.size(), tensors.size()});
  for (size_t i = 0; i < rows.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].numel() == rows[i].count, name, " must have ", rows[i].count, " entries, got ",
                    tensors[i].numel());
    rows[i].data[place] = device_address(name, tensors[i], like, false);
    rows[i].storage[place] = uint8_t(storage_of(name, tensors[i]));
  }
}

Table upload(Rows& rows, const OnDevice& on) {
  const int64_t count = int64_t(rows.rows.size());
  const int64_t chunks = settle(rows.rows.data(), count);
  STD_TORCH_CHECK(chunks < int64_t(1) << 31, "thetas must have fewer than 2^44 entries together");
  cudaStreamCaptureStatus capturing;
  check(cudaStreamIsCapturing(on.stream, &capturing), "cudaStreamIsCapturing");
  // A graph gets a table of its own, in memory of its own, which every replay writes again: a cached one could be gone
  // when the graph runs, and what a capture writes is not there for calls outside of the graph.
  Tensor memory = capturing == cudaStreamCaptureStatusNone ? cached_table(rows, on) : write_table(rows, on.stream);
  const char* const address = address_of(memory);
  const auto any = [&](bool wide) {
    return std::any_of(rows.rows.begin(), rows.rows.end(),
                       [wide](const Row& row) { return row.count > 0 && row.wide == uint8_t(wide); });
  };
  return {memory,
          reinterpret_cast<const Row*>(address),
          reinterpret_cast<const Numbers*>(address + bytes_in(rows.rows)),
          count,
          chunks,
          any(false),
          any(true)};
}

Tensor sum_chunks(const Table& table, const ChunkSum* sums, const Tensor& like, const OnDevice& on) {
  Tensor result = torch::stable::new_empty(like, {table.count, 2}, ScalarType::Double);
  sum_kernel<<<unsigned(table.count), kThreads, 0, on.stream>>>(table.rows, table.count, table.chunks, sums,
                                                                static_cast<double*>(result.mutable_data_ptr()));
  check(cudaGetLastError(), "the sum over chunks");
  return result;
}

}  // namespace mas_fast::cuda
