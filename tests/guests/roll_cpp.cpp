// Proves: ckpt.h in C++. Going back out of a handler of an exception, over frames whose
// destructors do not run, to a state whose containers are as they were; by explicit id and to the
// latest checkpoint (-1). Without the library every call says so.
#include "guest.h"

#include "ckpt.h"
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

static long destroyed; // protected from the second time on
struct Counted {
    std::vector<long> values{1, 2, 3};
    ~Counted() { destroyed++; }
};

static void thrower(std::map<std::string, std::vector<long>> &table, int depth)
{
    Counted frame;
    table["depth " + std::to_string(depth)] = std::vector<long>(1000 * depth + 1, depth);
    if (depth == 0)
        throw std::runtime_error("the bottom");
    thrower(table, depth - 1);
}

int main(int argc, char **)
{
    if (argc > 1) {
        errno = 0;
        CHECK_EQ(ckpt_checkpoint(1), -1);
        CHECK_EQ(errno, ENOSYS);
        CHECK_EQ(ckpt_rollback(1, 1, nullptr, 0), -1);
        CHECK_EQ(errno, ENOSYS);
        puts("not loaded");
        return 0;
    }
    guest_begin();
    std::map<std::string, std::vector<long>> table{{"first", {1, 2, 3}}};
    std::vector<std::string> words(1000, "as long as no small string is");
    volatile int back = 0;
    int result = ckpt_checkpoint(4);
    CHECK(result >= 0);
    CHECK_EQ(result, back == 0 ? 0 : 10 + back);
    CHECK_EQ(table.size(), 1u);
    CHECK_EQ(table["first"].size(), 3u);
    CHECK(words.size() == 1000 && words[999] == "as long as no small string is");
    if (back < 4) {
        back = back + 1;
        ckpt_region keep[] = {{const_cast<int *>(&back), sizeof back}, {&destroyed, sizeof destroyed}};
        try {
            Counted outer;
            words.clear();
            words.shrink_to_fit();
            table.erase("first");
            thrower(table, 20);
        } catch (const std::runtime_error &error) {
            CHECK(std::string(error.what()) == "the bottom");
            CHECK_EQ(table.size(), 21u);
            CHECK_EQ(destroyed, 22 * back);
            // One more object, whose destructor a rollback does not run.
            Counted lost;
            ckpt_rollback(back % 2 ? 4 : -1, 10 + back, keep, 2);
            FAIL("ckpt_rollback: errno %d", errno);
        }
        FAIL("nothing was thrown");
    }
    printf("%d times, %ld destroyed\n", back, destroyed);
    guest_end();
}
