// Streams for Python: addresses and sizes in, nothing out, or a failure as (failure, peer, what the peer sent instead).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/streams.h"

namespace py = pybind11;
using namespace flashcomm;
using Ends = std::vector<std::pair<std::uintptr_t, int>>;  // End, by rank
using Sizes = std::vector<uint64_t>;

static std::unique_ptr<Streams> open_streams(int rank, const Ends& ends, uint64_t capacity) {
    std::vector<End> out;
    for (const auto& [segment, lock] : ends) out.push_back({segment, lock});
    return std::make_unique<Streams>(rank, out, capacity);
}

// Messages that lie one behind the other.
static std::vector<Posting> consecutive(std::uintptr_t start, const Sizes& sizes) {
    std::vector<Posting> out;
    for (const uint64_t bytes : sizes) out.push_back({start, bytes}), start += bytes;
    return out;
}

static bool has_signal() {  // Ctrl-C, say: its Python exception is then set
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

static py::object wait(Streams& streams, const Streams::Handle& handle, double seconds, double patience) {
    Outcome outcome;
    {
        const py::gil_scoped_release release;
        outcome = streams.wait(handle, seconds, has_signal, patience);
    }
    if (outcome.failure == Failure::none) return py::none();
    if (outcome.failure == Failure::interrupted) throw py::error_already_set();
    const auto theirs = py::bytes(outcome.theirs).attr("decode")("utf-8", "replace");
    return py::make_tuple((int)outcome.failure, outcome.peer, theirs);
}

void bind_streams(py::module_& m) {
    m.def("segment_bytes", &segment_bytes);
    py::class_<Streams::Exchange, Streams::Handle>(m, "Exchange").def_readonly("open", &Streams::Exchange::open);
    py::class_<Streams>(m, "Streams")
        .def(py::init(&open_streams))
        .def("exchange",
             [](Streams& streams, std::uintptr_t outbox, const Sizes& out_sizes, std::uintptr_t inbox,
                const Sizes& in_sizes, uint64_t number, const std::string& what) {
                 const auto out = consecutive(outbox, out_sizes), in = consecutive(inbox, in_sizes);
                 const py::gil_scoped_release release;
                 return streams.start(out, in, number, what);
             })
        .def("gather",
             [](Streams& streams, int rank, std::uintptr_t inbox, uint64_t size, size_t world, uint64_t number,
                const std::string& what) {
                 const auto in = consecutive(inbox, Sizes(world, size));
                 const py::gil_scoped_release release;
                 return streams.start(std::vector<Posting>(world, in[rank]), in, number, what);
             })
        .def("wait", &wait);
}
