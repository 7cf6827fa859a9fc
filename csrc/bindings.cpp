// The Python module flashcomm_megatron._C: raw addresses in, nothing checked. codec/native.py checks.
// One file: most of its compile time is pybind11, whatever is bound.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "cpu/streams.h"

namespace py = pybind11;
using namespace flashcomm;
using Address = std::uintptr_t;
using Codec = std::tuple<int, int, int64_t>;  // format, bits, block
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

static py::dict info() {
    std::vector<std::string> isas;
    for (int i = 0; isa_name(i); i++) isas.push_back(isa_name(i));
#ifdef FLASHCOMM_CUDA_ARCHS
    const char *cuda = FLASHCOMM_CUDA_ARCHS, *without_cuda = "";
#else
    const char *cuda = "", *without_cuda = FLASHCOMM_WITHOUT_CUDA;
#endif
    return py::dict(py::arg("isas") = isas, py::arg("isa") = isa_in_use(), py::arg("formats") = (int)kFormats,
                    py::arg("cuda") = cuda, py::arg("without_cuda") = without_cuda);
}

// ---- streams: addresses and sizes in, nothing out, or a failure as (failure, peer, what the peer sent instead) ----

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

static void bind_streams(py::module_& m) {
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

// ---- the module ------------------------------------------------------------------------------------------------

#ifdef FLASHCOMM_CUDA_ARCHS
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled codec; see flashcomm_megatron/codec/native.py.";
    m.attr("interface") = kInterface;
    m.def("info", info);
    m.def("use_isa", use_isa);
    bind_streams(m);
    m.def(
        "encode_slices",
        [](Address x, Address residual, int dtype, Codec codec, int64_t width, int64_t numel, int64_t length,
           int64_t count, int64_t stride, Address payloads, int threads) {
            const auto [format, bits, block] = codec;
            encode_slices((const void*)x, (void*)residual, dtype,
                          {format, bits, block, width, numel, length, count, stride}, (uint8_t*)payloads, threads);
        },
        ReleaseGil());
    m.def(
        "decode_slices",
        [](Address payloads, Codec codec, int64_t width, int64_t numel, int64_t length, int64_t count, int64_t stride,
           Address x, int dtype, int threads) {
            const auto [format, bits, block] = codec;
            decode_slices((const uint8_t*)payloads, {format, bits, block, width, numel, length, count, stride},
                          (void*)x, dtype, threads);
        },
        ReleaseGil());
    m.def(
        "reduce_slices",
        [](const std::vector<Address>& payloads, Codec codec, int64_t width, int64_t numel, Address out, int dtype,
           std::optional<Codec> gather, Address payload, Address residual, int threads) {
            const auto spec = [&](Codec of) {
                return Spec{std::get<0>(of), std::get<1>(of), std::get<2>(of), numel, width};
            };
            const Spec second = spec(gather.value_or(codec));
            reduce_slices(reinterpret_cast<const uint8_t* const*>(payloads.data()), (int)payloads.size(), spec(codec),
                          (void*)out, dtype, gather ? &second : nullptr, (uint8_t*)payload, (void*)residual, threads);
        },
        ReleaseGil());
#ifdef FLASHCOMM_CUDA_ARCHS
    bind_cuda(m);
#endif
}
