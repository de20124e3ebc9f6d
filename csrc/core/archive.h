// Snapshots of format 1, which are archives as torch.save writes them: read, no longer written.
#pragma once

#include <ATen/core/ivalue.h>

#include <map>
#include <span>
#include <string>
#include <string_view>

#include "ctx/snapshot.h"

namespace ctx {

// Whether bytes begin as an archive does.
bool is_archive(std::span<const char> bytes);

// What torch.save put into an archive.
struct Archived {
  c10::IValue value;
  std::map<const void*, size_t> records;  // how large the data of each storage is

  // A tensor of the value. torch believes what a pickle says of its sizes: throws c10::Error where it
  // would lie beyond the data.
  at::Tensor tensor(const c10::IValue& part) const;
};

// Reads an archive. Throws c10::Error unless all records are stored as they are (torch's kind), each
// with the checksum that the archive says it has: torch does not look at checksums.
//
//   rewritten  of the pickle, before it is read
Archived read_archived(std::span<const char> bytes,
                       std::string (*rewritten)(std::string_view pickle) = nullptr);

// What an archive of a dict holds. Throws what torch throws where it is damaged or another.
Snapshot read_archive(std::span<const char> bytes);

}  // namespace ctx
