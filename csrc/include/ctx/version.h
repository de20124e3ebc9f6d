// Which ctx this is: of the headers, as numbers for the preprocessor, and of the library in use.
//
// Versions with the same major and minor number go together; find_package(ctx 0.2) asks for one.
#pragma once

#include <string>

#include "ctx/export.h"

#define CTX_VERSION_MAJOR 0
#define CTX_VERSION_MINOR 2
#define CTX_VERSION_PATCH 0

namespace ctx {

// "0.2.0", of libctx. A program that was compiled against other headers sees that they differ.
CTX_API std::string version();

// "2.13.0", of the torch that libctx was compiled against. The torch in use must have the same minor
// version: torch's C++ interface differs between them. find_package(ctx) refuses another one.
CTX_API std::string torch_version();

}  // namespace ctx
