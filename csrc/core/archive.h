// Snapshots of format 1, which are archives as torch.save writes them: read, no longer written.
#pragma once

#include <span>

#include "ctx/snapshot.h"

namespace ctx {

// Whether all records are stored as they are (torch's kind), each with the checksum that the archive
// says it has. torch does not look at checksums, and trusts the sizes that it finds.
bool is_whole_archive(std::span<const char> bytes);

// Whether bytes begin as an archive does.
bool is_archive(std::span<const char> bytes);

// What an archive of a dict holds. Throws what torch throws where it is damaged or another.
Snapshot read_archive(std::span<const char> bytes);

}  // namespace ctx
