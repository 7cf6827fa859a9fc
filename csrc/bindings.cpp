// The Python module flashcomm_megatron._C: raw addresses in, nothing checked. flashcomm_megatron/codec/native.py checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"

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

void bind_streams(py::module_& m);  // bindings_streams.cpp
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
