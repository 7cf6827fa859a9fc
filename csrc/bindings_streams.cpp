// Streams for Python: addresses and descriptors in, outcomes as (failure, peer, what the peer sent instead).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/streams.h"

namespace py = pybind11;
using namespace flashcomm;
using Ends = std::vector<std::tuple<std::uintptr_t, int, int>>;  // End, by rank
using Postings = std::vector<std::pair<std::uintptr_t, uint64_t>>;

static std::unique_ptr<Streams> open_streams(int rank, const Ends& ends, uint64_t capacity) {
    std::vector<End> out;
    for (const auto& [segment, lock, socket] : ends) out.push_back({segment, lock, socket});
    return std::make_unique<Streams>(rank, out, capacity);
}

static std::vector<Posting> postings(const Postings& pairs) {
    std::vector<Posting> out;
    for (const auto& [address, bytes] : pairs) out.push_back({address, bytes});
    return out;
}

static bool has_signal() {  // Ctrl-C, say: its Python exception is then set
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

void bind_streams(py::module_& m) {
    m.def("segment_bytes", &segment_bytes);
    py::class_<Streams::Exchange, Streams::Handle>(m, "Exchange").def_readonly("open", &Streams::Exchange::open);
    py::class_<Streams>(m, "Streams")
        .def(py::init(&open_streams))
        .def("start", [](Streams& streams, const Postings& sends, const Postings& receives, const std::string& what) {
            const auto out = postings(sends), in = postings(receives);
            const py::gil_scoped_release release;
            return streams.start(out, in, what);
        })
        .def("wait", [](Streams& streams, const Streams::Handle& handle, double seconds) {
            Outcome outcome;
            {
                const py::gil_scoped_release release;
                outcome = streams.wait(handle, seconds, has_signal);
            }
            if (outcome.failure == Failure::interrupted) throw py::error_already_set();
            const auto theirs = py::bytes(outcome.theirs).attr("decode")("utf-8", "replace");
            return py::make_tuple((int)outcome.failure, outcome.peer, theirs);
        });
}
