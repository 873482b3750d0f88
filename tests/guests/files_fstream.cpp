// Proves: iostreams of C++ (output, update in place, append) agree with memory.
#include "guest.h"
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main()
{
    guest_begin();
    std::ofstream out("out.txt");
    std::fstream table("table.bin", std::ios::in | std::ios::out | std::ios::binary | std::ios::trunc);
    std::vector<uint64_t> want(500);
    table.write(reinterpret_cast<char *>(want.data()), want.size() * 8);
    ROUNDS(round)
    {
        for (int k = 0; k < 20; k++) {
            size_t at = guest_mix(round * 32 + k) % want.size();
            uint64_t is = 0;
            table.seekg(at * 8);
            table.read(reinterpret_cast<char *>(&is), 8);
            CHECK_EQ(is, want[at]);
            want[at] += round;
            table.seekp(at * 8);
            table.write(reinterpret_cast<char *>(&want[at]), 8);
            out << round << '.' << k << ' ' << want[at] << '\n';
        }
        std::ofstream log("log.txt", std::ios::app);
        log << "round " << round << std::endl;
        CHECK(table.good() && out.good() && log.good());
    }
    out.close();
    table.close();
    std::cout << "fstream ok" << std::endl;
    guest_end();
}
