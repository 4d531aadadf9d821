// A file that is read without leaving it in the page cache, which would be memory that nobody counted.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tenfold {

constexpr size_t PAGE = 4096;

// What a person must be told about a file; it names the file.
struct ReadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class File {
public:
    // Throws ReadError.
    explicit File(std::string path);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const std::string& path() const { return path_; }

    // All of it, by any thread: past the cache where memory, place and size are whole pages and the file system
    // can, else through it and out again. Throws ReadError if the file is shorter, or the system refuses.
    void read(uint64_t offset, size_t size, uint8_t* to);

private:
    [[noreturn]] void fail(int error) const;

    std::string path_;
    int plain_ = -1, direct_ = -1;
    std::atomic<bool> can_be_direct_;
};

}  // namespace tenfold
