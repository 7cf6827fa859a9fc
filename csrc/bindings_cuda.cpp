// The part of flashcomm_megatron._C that only builds with nvcc have: api.h's CUDA codecs and workspace.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "api.h"
#include "cuda/workspace.h"

namespace py = pybind11;
using namespace flashcomm;
using Address = std::uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

using Codec = std::tuple<int, int, int64_t>;  // format, bits, block

static Spec spec_of(const Codec& codec, int64_t numel, int64_t width) {
    return {std::get<0>(codec), std::get<1>(codec), std::get<2>(codec), numel, width};
}
static Slices slices_of(const Codec& codec, int64_t width, int64_t numel, int64_t length, int64_t count,
                        int64_t stride) {
    return {std::get<0>(codec), std::get<1>(codec), std::get<2>(codec), width, numel, length, count, stride};
}

// As bindings.cpp has them, with a stream in the place of threads.
static void bind_codecs(py::module_& m) {
    m.def(
        "has_codec_cuda",
        [](int dtype, int format, int bits, int64_t block, int64_t numel, int64_t width) {
            return has_codec_cuda(dtype, {format, bits, block, numel, width});
        },
        py::arg("dtype"), py::arg("format"), py::arg("bits"), py::arg("block"), py::arg("numel") = 1,
        py::arg("width") = 0);
    m.def(
        "encode_slices_cuda",
        [](Address x, Address residual, int dtype, const Codec& codec, int64_t width, int64_t numel, int64_t length,
           int64_t count, int64_t stride, Address payloads, Address stream) {
            encode_slices_cuda((const void*)x, (void*)residual, dtype,
                               slices_of(codec, width, numel, length, count, stride), (uint8_t*)payloads,
                               (void*)stream);
        },
        ReleaseGil());
    m.def(
        "decode_slices_cuda",
        [](Address payloads, const Codec& codec, int64_t width, int64_t numel, int64_t length, int64_t count,
           int64_t stride, Address x, int dtype, Address stream) {
            decode_slices_cuda((const uint8_t*)payloads, slices_of(codec, width, numel, length, count, stride),
                               (void*)x, dtype, (void*)stream);
        },
        ReleaseGil());
    m.def(
        "reduce_slices_cuda",
        [](const std::vector<Address>& payloads, const Codec& codec, int64_t width, int64_t numel, Address out,
           int dtype, const std::optional<Codec>& gather, Address payload, Address residual, Address stream) {
            const Spec second = spec_of(gather.value_or(codec), numel, width);
            reduce_slices_cuda(reinterpret_cast<const uint8_t* const*>(payloads.data()), (int)payloads.size(),
                               spec_of(codec, numel, width), (void*)out, dtype, gather ? &second : nullptr,
                               (uint8_t*)payload, (void*)residual, (void*)stream);
        },
        ReleaseGil());
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
    take("dtype", made.dtype), take("numel", made.numel), take("slice", made.slice);
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

    py::class_<Leg>(m, "Leg").def(py::init<int, int, int>(), py::arg("format"), py::arg("bits"), py::arg("block"));
    py::class_<Request>(m, "Request").def(py::init(&request_of));
    py::class_<Workspace>(m, "Workspace")
        .def(py::init<int, int, int, int, int, int64_t, std::vector<uintptr_t>>(), py::arg("device"), py::arg("world"),
             py::arg("first"), py::arg("ranks"), py::arg("blocks"), py::arg("region"), py::arg("inboxes"))
        .def("launch", &Workspace::launch, ReleaseGil())
        .def("shape", &Workspace::shape)
        .def("error", &Workspace::error)
        .def("preset", &Workspace::preset, ReleaseGil())
        .def("close", &Workspace::close, ReleaseGil());
}
