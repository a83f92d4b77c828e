// NCCL between processes of one machine, without a GPU: every message is a file in memory.
//
// Device memory is host memory here, and a call has done its work when it returns. Sends never wait; receives of a
// group wait at its end, behind all of its sends. Ranks must make collective calls in one order, as NCCL asks too.
//
// NULL_CUDA_MESSAGES: a directory that all processes of the job share, on a file system in memory. Without it no
// message travels and every call succeeds.

// nccl.h includes these for nothing that it declares, and they need more of CUDA's headers.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__

#include <fcntl.h>
#include <nccl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct ncclComm {
  std::string name;
  int rank, size;
  std::map<int, int> sent, received;  // so many to and from each rank
};

namespace {

using Bytes = std::vector<char>;

const char* const directory = std::getenv("NULL_CUDA_MESSAGES");
thread_local int group_depth = 0;
thread_local std::vector<std::function<void()>> delayed;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "null CUDA's NCCL: %s\n", what.c_str());
  std::abort();
}

std::string path_of(ncclComm* comm, int from, int to, int number) {
  return std::string(directory) + "/" + comm->name + "." + std::to_string(from) + "." + std::to_string(to) + "." +
         std::to_string(number);
}

void send(ncclComm* comm, const void* data, size_t bytes, int to) {
  std::string path = path_of(comm, comm->rank, to, comm->sent[to]++), unfinished = path + ".tmp";
  int file = open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  for (size_t done = 0; done < bytes;) {
    ssize_t written = write(file, static_cast<const char*>(data) + done, bytes - done);
    if (written <= 0) fail("cannot write " + unfinished);
    done += written;
  }
  close(file);
  std::rename(unfinished.c_str(), path.c_str());
}

std::string next_from(ncclComm* comm, int from) { return path_of(comm, from, comm->rank, comm->received[from]++); }

void receive(const std::string& path, void* data, size_t bytes) {
  auto begin = std::chrono::steady_clock::now();
  int file;
  while ((file = open(path.c_str(), O_RDONLY)) < 0) {
    if (std::chrono::steady_clock::now() - begin > std::chrono::minutes(5)) fail("no message " + path);
    usleep(50);
  }
  struct stat status;
  fstat(file, &status);
  if (static_cast<size_t>(status.st_size) != bytes)
    fail(path + " has " + std::to_string(status.st_size) + " bytes, expected " + std::to_string(bytes));
  for (size_t done = 0; done < bytes;) {
    ssize_t got = read(file, static_cast<char*>(data) + done, bytes - done);
    if (got <= 0) fail("cannot read " + path);
    done += got;
  }
  close(file);
  unlink(path.c_str());
}

size_t width_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    default: return 8;
  }
}

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  BFloat16& operator=(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = std::isnan(value) ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest, ties to even
    return *this;
  }
};

// Reduces parts[0], parts[1], ... in that order, on every rank the same; `Sum` is what it adds up in.
template <typename Element, typename Sum>
void reduce_as(const std::vector<Bytes>& parts, void* out, size_t count, ncclRedOp_t op) {
  auto* result = static_cast<Element*>(out);
  for (size_t i = 0; i < count; ++i) {
    Sum total = reinterpret_cast<const Element*>(parts[0].data())[i];
    for (size_t part = 1; part < parts.size(); ++part) {
      Sum value = reinterpret_cast<const Element*>(parts[part].data())[i];
      total = op == ncclMax ? std::max(total, value)
            : op == ncclMin ? std::min(total, value)
            : op == ncclProd ? total * value
                             : total + value;
    }
    result[i] = op == ncclAvg ? total / static_cast<Sum>(parts.size()) : total;
  }
}

void reduce(const std::vector<Bytes>& parts, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
    case ncclFloat32: return reduce_as<float, float>(parts, out, count, op);
    case ncclFloat64: return reduce_as<double, double>(parts, out, count, op);
    case ncclBfloat16: return reduce_as<BFloat16, float>(parts, out, count, op);
    case ncclFloat16: return reduce_as<_Float16, float>(parts, out, count, op);
    case ncclInt8: return reduce_as<int8_t, int8_t>(parts, out, count, op);
    case ncclUint8: return reduce_as<uint8_t, uint8_t>(parts, out, count, op);
    case ncclInt32: return reduce_as<int32_t, int32_t>(parts, out, count, op);
    case ncclInt64: return reduce_as<int64_t, int64_t>(parts, out, count, op);
    default: fail("cannot reduce elements of type " + std::to_string(type));
  }
}

// Every rank's `data`, in the order of ranks; `slice_bytes(to)` of it go to rank `to`, from where `slice(to)` says.
std::vector<Bytes> exchange(ncclComm* comm, size_t bytes, std::function<const void*(int)> slice) {
  for (int to = 0; to < comm->size; ++to)
    if (to != comm->rank) send(comm, slice(to), bytes, to);
  std::vector<Bytes> parts(comm->size, Bytes(bytes));
  for (int from = 0; from < comm->size; ++from)
    if (from == comm->rank)
      std::memcpy(parts[from].data(), slice(from), bytes);
    else
      receive(next_from(comm, from), parts[from].data(), bytes);
  return parts;
}

void concatenate(const std::vector<Bytes>& parts, void* out) {
  auto* end = static_cast<char*>(out);
  for (const Bytes& part : parts) end = std::copy(part.begin(), part.end(), end);
}

}  // namespace

extern "C" {

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static int made = 0;
  std::memset(id, 0, sizeof *id);
  auto now = std::chrono::system_clock::now().time_since_epoch().count();
  std::snprintf(id->internal, sizeof id->internal, "%d-%d-%lld", getpid(), made++, static_cast<long long>(now));
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  *comm = new ncclComm{id.internal, rank, size};
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
  return ncclCommInitRank(comm, size, id, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return ncclCommInitRank(comm, size, ids[0], rank);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int, int, ncclComm_t* part, ncclConfig_t*) {
  if (directory) fail("ncclCommSplit is not built");
  *part = new ncclComm(*comm);
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { return *error = ncclSuccess; }
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) { return *count = comm->size, ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) { return *rank = comm->rank, ncclSuccess; }

ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (--group_depth) return ncclSuccess;
  for (auto& call : std::exchange(delayed, {})) call();
  return ncclSuccess;
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int to, ncclComm_t comm, cudaStream_t) {
  if (!directory) return ncclSuccess;
  send(comm, data, count * width_of(type), to);
  return ncclSuccess;
}
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int from, ncclComm_t comm, cudaStream_t) {
  if (!directory) return ncclSuccess;
  auto call = [=, path = next_from(comm, from)] { receive(path, data, count * width_of(type)); };
  if (group_depth)
    delayed.push_back(call);
  else
    call();
  return ncclSuccess;
}
ncclResult_t ncclAllGather(const void* data, void* out, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t) {
  if (!directory) return ncclSuccess;
  concatenate(exchange(comm, count * width_of(type), [=](int) { return data; }), out);
  return ncclSuccess;
}
ncclResult_t ncclAllReduce(const void* data, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t) {
  if (!directory) return ncclSuccess;
  reduce(exchange(comm, count * width_of(type), [=](int) { return data; }), out, count, type, op);
  return ncclSuccess;
}
ncclResult_t ncclReduce(const void* data, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t) {
  if (!directory) return ncclSuccess;
  auto parts = exchange(comm, count * width_of(type), [=](int) { return data; });
  if (comm->rank == root) reduce(parts, out, count, type, op);
  return ncclSuccess;
}
ncclResult_t ncclReduceScatter(const void* data, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t) {
  if (!directory) return ncclSuccess;
  size_t bytes = count * width_of(type);
  auto slice = [=](int to) { return static_cast<const char*>(data) + to * bytes; };
  reduce(exchange(comm, bytes, slice), out, count, type, op);
  return ncclSuccess;
}
ncclResult_t ncclAlltoAll(const void* data, void* out, size_t count, ncclDataType_t type, ncclComm_t comm,
                          cudaStream_t) {
  if (!directory) return ncclSuccess;
  size_t bytes = count * width_of(type);
  auto slice = [=](int to) { return static_cast<const char*>(data) + to * bytes; };
  concatenate(exchange(comm, bytes, slice), out);
  return ncclSuccess;
}
ncclResult_t ncclBroadcast(const void* data, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t) {
  if (!directory) return ncclSuccess;
  size_t bytes = count * width_of(type);
  if (comm->rank != root) {
    receive(next_from(comm, root), out, bytes);
    return ncclSuccess;
  }
  for (int to = 0; to < comm->size; ++to)
    if (to != root) send(comm, data, bytes, to);
  if (out != data) std::memmove(out, data, bytes);
  return ncclSuccess;
}
ncclResult_t ncclBcast(void* data, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, comm, stream);
}

}  // extern "C"
