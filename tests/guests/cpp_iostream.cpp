// Proves: a C++ program with iostreams, exceptions, threads, containers, thread_local objects
// with destructors, std::future and regular expressions survives.
#include "guest.h"
#include <future>
#include <iostream>
#include <map>
#include <mutex>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <vector>

static std::atomic<int> destroyed{0};
struct Local {
    std::vector<long> values;
    ~Local() { destroyed++; }
};
static thread_local Local local;

static long thrower(long depth)
{
    std::string text(depth + 20, 'x');
    if (depth == 0)
        throw std::runtime_error(text);
    return thrower(depth - 1) + static_cast<long>(text.size());
}

static long work(long id)
{
    std::map<std::string, long> counts;
    long caught = 0;
    ROUNDS(round)
    {
        std::ostringstream key;
        key << "key-" << (round * 7 + id) % 13;
        counts[key.str()]++;
        local.values.push_back(round);
        CHECK_EQ(local.values.size(), round + 1);
        try {
            thrower(round % 20);
        } catch (const std::runtime_error &error) {
            caught += std::string(error.what()).size();
        }
    }
    long sum = caught;
    for (auto &[key, count] : counts)
        sum = sum * 31 + count + static_cast<long>(key.size());
    return sum;
}

int main()
{
    guest_begin();
    std::vector<std::future<long>> results;
    for (long id = 0; id < 3; id++)
        results.push_back(std::async(std::launch::async, work, id));
    std::regex number("([0-9]+)-([a-z]+)");
    ROUNDS(round)
    {
        std::smatch match;
        std::string text = std::to_string(round) + "-abc";
        CHECK(std::regex_match(text, match, number) && match[1] == std::to_string(round));
        std::cout << "line " << round << " " << round / 3.0 << "\n";
    }
    for (auto &result : results)
        std::cout << result.get() << std::endl;
    CHECK_EQ(destroyed, 3);
    std::cout << "iostream ok\n";
    guest_end();
}
