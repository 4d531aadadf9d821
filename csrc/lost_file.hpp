// What happens where a file that is mapped does not give its bytes any more.
#pragma once

namespace tenfold {

// From now on a process that reads beyond the end of a mapped file, which someone cut short, or from a disk that
// fails, says so in one line and exits with status 2, unless it handles SIGBUS itself. It cannot go on: the
// kernels that wanted these bytes have no numbers to go on with.
void end_where_a_file_is_lost();

}  // namespace tenfold
