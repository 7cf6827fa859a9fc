// Moving bytes through a TCP connection without waiting, and waiting for several: sockets.h.
#include "cpu/sockets.h"

#include <poll.h>
#include <sys/socket.h>
#include <time.h>

#include <cerrno>

#if !defined(__linux__)  // elsewhere a packet more, a signal that Python ignores, and a peer missed a little later
#define MSG_MORE 0
#define MSG_NOSIGNAL 0
#define POLLRDHUP 0
#endif

namespace flashcomm {

namespace {

bool is_for_now() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR || errno == ENOBUFS; }

}  // namespace

Socket::Socket(int descriptor) : descriptor_(descriptor) {}

uint64_t Socket::write(const uint8_t* from, uint64_t bytes, bool more) {
    const auto moved = ::send(descriptor_, from, bytes, MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0));
    broken_ |= moved < 0 && !is_for_now();
    return moved > 0 ? (uint64_t)moved : 0;
}

uint64_t Socket::read(uint8_t* to, uint64_t bytes) {
    const auto moved = ::recv(descriptor_, to, bytes, MSG_DONTWAIT);
    broken_ |= moved == 0 || (moved < 0 && !is_for_now());
    return moved > 0 ? (uint64_t)moved : 0;
}

Failure Socket::state() {
    pollfd query{descriptor_, POLLRDHUP, 0};
    const bool hung_up = ::poll(&query, 1, 0) > 0 && (query.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL));
    return broken_ || hung_up ? Failure::closed : Failure::none;
}

void Socket::give_up() { ::shutdown(descriptor_, SHUT_WR); }  // what was written before still arrives

void wait_for_sockets(const std::vector<Awaited>& sockets, long nanoseconds) {
    std::vector<pollfd> queries;
    for (const Awaited& each : sockets)
        queries.push_back({each.descriptor, (short)((each.to_read ? POLLIN : 0) | (each.to_write ? POLLOUT : 0)), 0});
#if defined(__linux__)
    const timespec nap{0, nanoseconds};
    ::ppoll(queries.data(), queries.size(), &nap, nullptr);
#else
    ::poll(queries.data(), (nfds_t)queries.size(), (int)(nanoseconds / 1'000'000) + 1);
#endif
}

}  // namespace flashcomm
