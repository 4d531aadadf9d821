// Is it faster with or without? Tried now and then, by the clock.
#pragma once

#include <algorithm>

namespace tenfold {

// Windows of steps without, with, with, without (so that a steady drift meets both alike); then the faster for
// a while, which is longer each time that `with` has lost.
class Trial {
public:
    bool on() const { return trying() ? window() == 1 || window() == 2 : won_; }

    void step(double seconds) {
        if (trying()) (on() ? with_ : without_) += seconds;
        if (++step_ == TRIED) judge();
        if (step_ < TRIED + pause_) return;
        step_ = 0;
        with_ = without_ = 0;
    }

private:
    static constexpr int WINDOW = 16, TRIED = 4 * WINDOW, PAUSE = 512, LONGEST = 16384;
    static constexpr double WORTH = 0.98;  // less is noise, and reading for nothing wears the disk of others

    bool trying() const { return step_ < TRIED; }
    int window() const { return step_ / WINDOW; }
    void judge() {
        won_ = with_ < WORTH * without_;
        pause_ = won_ ? PAUSE : std::min(2 * pause_, LONGEST);
    }

    int step_ = 0, pause_ = PAUSE;
    double with_ = 0, without_ = 0;
    bool won_ = false;
};

}  // namespace tenfold
