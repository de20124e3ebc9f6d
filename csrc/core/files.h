// Files that are read and written as a whole.
#pragma once

#include <span>
#include <string>
#include <vector>

namespace ctx::files {

// Everything in a file. Throws std::system_error, and ValueError for a path that names none.
std::vector<char> read(const std::string& path, const char* where);

// Writes to a file beside `path`, which then takes its place; throws as read() does, and the old
// file is as it was.
void replace(const std::string& path, std::span<const char> bytes, const char* where);

}  // namespace ctx::files
