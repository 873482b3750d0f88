/* Proves: a TCP server that does not set SO_REUSEADDR listens at its address again, although the kernel holds what its
 * killed life has left of its connections for a minute. The start was refused as long: "address in use". */
#include "guest.h"
#include <netinet/in.h>
#include <sys/socket.h>

static int client_of(const struct sockaddr_in *address)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && connect(fd, (const struct sockaddr *)address, sizeof *address) == 0);
    return fd;
}

int main(void)
{
    guest_begin();
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, now;
    socklen_t length = sizeof address;
    int server = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(server >= 0 && bind(server, (struct sockaddr *)&address, length) == 0 && listen(server, 16) == 0);
    CHECK(getsockname(server, (struct sockaddr *)&address, &length) == 0);
    int lasting = client_of(&address), accepted = accept(server, NULL, NULL);
    CHECK(accepted >= 0);
    ROUNDS(round)
    {
        char byte = (char)round;
        CHECK(write(lasting, &byte, 1) == 1 && read(accepted, &byte, 1) == 1 && byte == (char)round);
        /* The server's end is closed first: it is the one that the kernel remembers. */
        int client = client_of(&address), served = accept(server, NULL, NULL);
        CHECK(served >= 0 && write(served, "x", 1) == 1 && close(served) == 0);
        CHECK(read(client, &byte, 1) == 1 && read(client, &byte, 1) == 0 && close(client) == 0);
        length = sizeof now;
        CHECK(getsockname(server, (struct sockaddr *)&now, &length) == 0 && now.sin_port == address.sin_port);
    }
    printf("server ok\n");
    guest_end();
}
