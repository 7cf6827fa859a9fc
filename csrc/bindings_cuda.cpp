// The part of flashcomm_megatron._C that only builds with nvcc have: api.h's CUDA codecs and workspace.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "cuda/workspace.h"

namespace py = pybind11;
using namespace flashcomm;
using Address = std::uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

static void bind_codecs(py::module_& m) {
    m.def("has_codec_cuda", [](int dtype, int format, int bits, int64_t block) {
        return has_codec_cuda(dtype, {format, bits, block, 1});
    });
    m.def("encode_cuda", [](Address x, int dtype, int64_t numel, int format, int bits, int64_t block, Address payload,
                            Address residual, Address stream) {
        const Spec spec = {format, bits, block, numel};
        encode_cuda((const void*)x, (void*)residual, dtype, spec, (uint8_t*)payload, (void*)stream);
    }, ReleaseGil());
    m.def("decode_sum_cuda", [](const std::vector<Address>& payloads, int64_t numel, int format, int bits,
                                int64_t block, Address out, int dtype, Address stream) {
        const auto* addresses = reinterpret_cast<const uint8_t* const*>(payloads.data());
        decode_sum_cuda(addresses, (int)payloads.size(), {format, bits, block, numel}, (void*)out, dtype,
                        (void*)stream);
    }, ReleaseGil());
}

// Request(kind=..., reduce=..., ...): every field by its name; those that tests alone set may be left out.
static Request request_of(const py::kwargs& given) {
    Request made;
    size_t taken = 0;
    const auto take = [&](const char* name, auto& field, bool is_optional = false) {
        if (is_optional && !given.contains(name)) return;
        field = given[name].cast<std::decay_t<decltype(field)>>();
        taken++;
    };
    take("kind", made.kind), take("reduce", made.reduce), take("gather", made.gather);
    take("dtype", made.dtype), take("numel", made.numel);
    take("x", made.x), take("out", made.out), take("residuals", made.residuals);
    take("stream", made.stream), take("deadline", made.deadline);
    take("stalled_rank", made.stalled_rank, true), take("stall", made.stall, true);
    take("single_buffer", made.single_buffer, true);
    if (taken != given.size()) throw py::type_error("Request: unknown field.");
    return made;
}

void bind_cuda(py::module_& m) {
    bind_codecs(m);
    m.def("device_blocks", device_blocks);
    m.def("device_uuid", [](int device) { return py::bytes(device_uuid(device)); });
    m.def("device_allocate", device_allocate, ReleaseGil());
    m.def("device_free", device_free, ReleaseGil());
    m.def("ipc_handle", [](int device, uintptr_t address) { return py::bytes(ipc_handle(device, address)); });
    m.def("ipc_open", ipc_open, ReleaseGil());
    m.def("ipc_close", ipc_close, ReleaseGil());
    m.def("host_register", host_register, ReleaseGil());
    m.def("host_unregister", host_unregister, ReleaseGil());
    m.def("inbox_bytes", inbox_bytes);
    m.def("slot_bytes", slot_bytes);
    m.def("has_collective", has_collective, py::arg("reduce"), py::arg("gather"), py::arg("dtype"),
          py::arg("with_residuals") = false);

    py::class_<Leg>(m, "Leg")
        .def(py::init<int, int, int>(), py::arg("format"), py::arg("bits"), py::arg("block"));
    py::class_<Request>(m, "Request")
        .def(py::init(&request_of));
    py::class_<Workspace>(m, "Workspace")
        .def(py::init<int, int, int, int, int, int64_t, std::vector<uintptr_t>>(), py::arg("device"), py::arg("world"),
             py::arg("first"), py::arg("ranks"), py::arg("blocks"), py::arg("region"), py::arg("inboxes"))
        .def("launch", &Workspace::launch, ReleaseGil())
        .def("shape", &Workspace::shape)
        .def("error", &Workspace::error)
        .def("preset", &Workspace::preset, ReleaseGil())
        .def("close", &Workspace::close, ReleaseGil());
}
