#include "file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace tenfold {

// Linux reads at most 2 GiB less a page at once.
constexpr size_t AT_ONCE = size_t{1} << 30;

File::File(std::string path) : path_(std::move(path)) {
    plain_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (plain_ < 0) fail(errno);
#if defined(O_DIRECT)
    direct_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
    can_be_direct_ = direct_ >= 0;
#if defined(POSIX_FADV_RANDOM)
    posix_fadvise(plain_, 0, 0, POSIX_FADV_RANDOM);  // nothing is read ahead
#endif
}

File::~File() {
    close(plain_);
    if (direct_ >= 0) close(direct_);
}

void File::read(uint64_t offset, size_t size, uint8_t* to) {
    const bool whole_pages = (offset | size | reinterpret_cast<uintptr_t>(to)) % PAGE == 0;
    for (size_t done = 0; done < size;) {
        // A direct read that ends early may leave the rest anywhere.
        const bool direct = whole_pages && done % PAGE == 0 && can_be_direct_;
        const size_t wanted = std::min(size - done, AT_ONCE);
        const ssize_t got = pread(direct ? direct_ : plain_, to + done, wanted, static_cast<off_t>(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && direct && errno == EINVAL) {
            can_be_direct_ = false;  // a file system that opens but does not read like that
            continue;
        }
        if (got < 0) fail(errno);
        if (got == 0)
            throw ReadError(path_ + ": cannot read " + std::to_string(size) + " bytes from byte " +
                            std::to_string(offset) + " on: it ends at byte " + std::to_string(offset + done));
#if defined(POSIX_FADV_DONTNEED)
        if (!direct) posix_fadvise(plain_, static_cast<off_t>(offset + done), got, POSIX_FADV_DONTNEED);
#endif
        done += static_cast<size_t>(got);
    }
}

void File::fail(int error) const { throw ReadError(path_ + ": cannot read it: " + std::strerror(error)); }

}  // namespace tenfold
