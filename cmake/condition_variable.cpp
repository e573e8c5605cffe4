// std::condition_variable::wait() of libstdc++ 12, which gave it a new symbol version (GLIBCXX_3.4.30: it throws nothing any more).
// Linked into what uses it, it leaves nothing that libstdc++ 11 lacks. It doesn't compile with any other C++ library.

#include <condition_variable>

namespace std {
    void condition_variable::wait(unique_lock<mutex> & lock) {
        _M_cond.wait(*lock.mutex());
    }
}
