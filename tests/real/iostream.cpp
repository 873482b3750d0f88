// A C++ program of streams, strings and containers, for the table of real programs.
#include <algorithm>
#include <iomanip>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

int main()
{
    unsigned long long state = 1;
    std::map<std::string, std::vector<double>> table;
    for (int round = 0; round < 60; round++) {
        for (int i = 0; i < 30000; i++) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            std::ostringstream key;
            key << std::hex << (state >> 55);
            table[key.str()].push_back((state >> 11) * 0x1p-53);
        }
        std::string longest;
        double sum = 0;
        for (auto &[key, values] : table) {
            std::sort(values.begin(), values.end());
            sum += values[values.size() / 2];
            longest = std::max(longest, key);
        }
        std::cout << std::setw(4) << round << ' ' << std::setprecision(12) << sum << ' ' << longest << '\n';
    }
}
