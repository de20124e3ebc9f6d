// Is an archive whole? torch reads archives without looking at their checksums, and trusts the
// sizes that it finds in them: a damaged file can end the process.
#pragma once

#include <vector>

namespace ctx {

// Whether `bytes` are a zip archive of records that are stored as they are (torch's kind), each
// with the checksum that the archive says it has.
bool is_whole_archive(const std::vector<char>& bytes);

}  // namespace ctx
