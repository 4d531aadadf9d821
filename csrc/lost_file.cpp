#include "lost_file.hpp"

#include <unistd.h>

#include <csignal>

namespace tenfold {
namespace {

constexpr char LOST[] =
    "tenfold: a file of the model was cut short while it was in use, or its disk failed: start again, and write a new"
    " model beside the old one before you put it in its place\n";

// Only what is safe within a signal handler.
void lost(int) {
    [[maybe_unused]] const auto written = write(STDERR_FILENO, LOST, sizeof LOST - 1);
    _exit(2);
}

}  // namespace

void end_where_a_file_is_lost() {
    struct sigaction now {};
    if (sigaction(SIGBUS, nullptr, &now) || now.sa_handler != SIG_DFL) return;
    now.sa_handler = lost;
    sigaction(SIGBUS, &now, nullptr);
}

}  // namespace tenfold
