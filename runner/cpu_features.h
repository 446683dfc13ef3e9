// What the CPU that runs this can do.
#pragma once

#include <string>

namespace qwen {

// Whether code compiled for `isa` ("default", "avx2", "avx512", as the manifest names them) runs here. A name
// that is not known does not.
bool cpu_supports(const std::string& isa);

}  // namespace qwen
