/* Many pages written over before each rollback: the same ones for a while, then others each time, some discarded, now and
 * then a checkpoint in between. All of the memory is compared after each. Arguments: MiB, rollbacks, seed. */
#include "guest.h"

#include "ckpt.h"

#define PAGE 4096

static struct model {
    uint64_t random;
    long round, rounds, base;
    size_t pages;
    unsigned char *version; /* of each page, as of the checkpoint */
} m;

static uint64_t below(uint64_t n)
{
    return (m.random = guest_mix(m.random)) % n;
}

static void write_page(unsigned char *data, size_t page, unsigned char version)
{
    guest_fill(data + page * PAGE, PAGE, page * 1000 + version);
}

static void compare(const unsigned char *data)
{
    for (size_t page = 0; page < m.pages; page++)
        if (!guest_holds(data + page * PAGE, PAGE, page * 1000 + m.version[page]))
            FAIL("round %ld, base %ld: page %zu is not of version %d", m.round, m.base, page, m.version[page]);
}

int main(int argc, char **argv)
{
    guest_begin();
    m.pages = (argc > 1 ? atol(argv[1]) : 32) << 8;
    m.rounds = argc > 2 ? atol(argv[2]) : 60;
    m.random = argc > 3 ? strtoul(argv[3], NULL, 10) : 1;
    unsigned char *data = guest_map(m.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static unsigned char version[1 << 16];
    CHECK(m.pages <= sizeof version);
    m.version = version;
    for (size_t page = 0; page < m.pages; page++)
        write_page(data, page, 0);
    for (;;) {
        int result = ckpt_checkpoint(1);
        if (result < 0)
            FAIL("ckpt_checkpoint: errno %d", errno);
        CHECK_EQ(result, result ? m.round % 100 + 1 : 0);
        /* Again and again to this checkpoint. What is protected says how often. */
        compare(data);
        if (m.round >= m.rounds)
            break;
        m.round++;
        long phase = m.round / 8 % 3;
        size_t count = phase == 0 ? 300 : 100 + below(400);
        size_t start = phase == 0 ? 0 : below(m.pages);
        for (size_t k = 0; k < count; k++) {
            size_t page = phase == 2 ? below(m.pages) : (start + 7 * k) % m.pages;
            if (below(50) == 0)
                CHECK_EQ(madvise(data + page * PAGE, PAGE, MADV_DONTNEED), 0);
            else
                write_page(data, page, 77);
        }
        if (below(6) == 0) {
            /* From here on the checkpoint is another one: some pages of it are new. */
            for (size_t page = 0; page < m.pages; page++)
                write_page(data, page, m.version[page]);
            for (size_t k = 0; k < 200; k++) {
                size_t page = below(m.pages);
                m.version[page]++;
                write_page(data, page, m.version[page]);
            }
            m.base = m.round;
            continue;
        }
        struct ckpt_region keep = {&m, sizeof m};
        ckpt_rollback(1, (int)(m.round % 100 + 1), &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    puts("pages ok");
    guest_end();
}
