// Memory that vectors of 64 bytes are read from and written to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace tenfold {

// It starts at a cache line, for a vector that lies in two takes the time of two. It is not cleared: zeros that
// nothing reads would have to come through the caches, which weights have just gone through.
template <class T>
struct LineAllocator {
    using value_type = T;
    static constexpr size_t LINE = 64;

    LineAllocator() = default;
    template <class Other>
    LineAllocator(const LineAllocator<Other>&) {}
    // From plain `new`, whose address lies before it: the aligned one takes longer, some 2% of a decoded token (LOG.md).
    T* allocate(size_t count) {
        void* const whole = ::operator new(count * sizeof(T) + LINE);
        void** const first = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(whole) / LINE + 1) * LINE);
        first[-1] = whole;
        return reinterpret_cast<T*>(first);
    }
    void deallocate(T* memory, size_t) { ::operator delete(reinterpret_cast<void**>(memory)[-1]); }
    template <class Other>
    void construct(Other* place) {
        ::new (static_cast<void*>(place)) Other;
    }
    template <class Other, class Value>
    void construct(Other* place, const Value& value) {
        ::new (static_cast<void*>(place)) Other(value);
    }
    bool operator==(const LineAllocator&) const { return true; }
};

template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

}  // namespace tenfold
