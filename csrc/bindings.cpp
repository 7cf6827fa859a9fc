// The Python module flashcomm_megatron._C: raw addresses in, nothing checked. flashcomm_megatron/codec/extension.py checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"

namespace py = pybind11;
using namespace flashcomm;
using Address = std::uintptr_t;
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
    m.doc() = "Compiled codec; see flashcomm_megatron/codec/extension.py.";
    m.attr("interface") = kInterface;
    m.def("info", info);
    m.def("use_isa", use_isa);
    bind_streams(m);
    m.def("encode", [](Address x, int dtype, int64_t numel, int format, int bits, int64_t block, Address payload,
                       Address memory, int threads) {
        encode((const void*)x, (void*)memory, dtype, {format, bits, block, numel}, (uint8_t*)payload, threads);
    }, ReleaseGil());
    m.def("decode_sum", [](const std::vector<Address>& payloads, int64_t numel, int format, int bits, int64_t block,
                           Address out, int dtype, int threads) {
        const auto* addresses = reinterpret_cast<const uint8_t* const*>(payloads.data());
        decode_sum(addresses, (int)payloads.size(), {format, bits, block, numel}, (void*)out, dtype, threads);
    }, ReleaseGil());
#ifdef FLASHCOMM_CUDA_ARCHS
    bind_cuda(m);
#endif
}
