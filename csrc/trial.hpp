// Is it faster with or without? Tried now and then, by the clock.
#pragma once

#include <algorithm>
#include <vector>

namespace tenfold {

// Steps of which every fourth is without; then, for a while, whichever had the lower median. The while is longer each
// time that `with` has lost.
class Trial {
public:
    bool on() const { return trying() ? tried_on() : won_; }

    void step(double seconds) {
        if (trying()) (tried_on() ? with_ : without_).push_back(seconds);
        if (++step_ == TRIED) judge();
        if (step_ >= TRIED + pause_) step_ = 0;
    }

private:
    static constexpr int TRIED = 128, PAUSE = 1024, LONGEST = 16384;
    static constexpr double WORTH = 0.98;  // less is noise, and reading for nothing wears the disk of others

    bool trying() const { return step_ < TRIED; }
    bool tried_on() const { return step_ % 4 != 0; }

    void judge() {
        won_ = median(with_) < WORTH * median(without_);
        pause_ = won_ ? PAUSE : std::min(2 * pause_, LONGEST);
        with_.clear(), without_.clear();
    }

    static double median(std::vector<double>& seconds) {
        const auto middle = seconds.begin() + seconds.size() / 2;
        std::nth_element(seconds.begin(), middle, seconds.end());
        return *middle;
    }

    int step_ = 0, pause_ = PAUSE;
    std::vector<double> with_, without_;
    bool won_ = false;
};

}  // namespace tenfold
