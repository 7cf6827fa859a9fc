// The part of flashcomm_megatron._C that only builds with nvcc have: workspace.h, raw addresses in, nothing checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "workspace.h"

namespace py = pybind11;
using namespace flashcomm;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

void bind_cuda(py::module_& m) {
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
          py::arg("carries") = false);

    py::class_<Leg>(m, "Leg")
        .def(py::init<int, int, int>(), py::arg("format"), py::arg("bits"), py::arg("block"));
    py::class_<Request>(m, "Request")
        .def(py::init<int, Leg, Leg, int, int64_t, std::vector<uintptr_t>, std::vector<uintptr_t>,
                      std::vector<uintptr_t>, uintptr_t, double, int, double, bool>(),
             py::arg("kind"), py::arg("reduce"), py::arg("gather"), py::arg("dtype"), py::arg("numel"), py::arg("x"),
             py::arg("out"), py::arg("lost"), py::arg("stream"), py::arg("deadline"), py::arg("stalled_rank") = 0,
             py::arg("stall") = 0.0, py::arg("single_buffer") = false);
    py::class_<Workspace>(m, "Workspace")
        .def(py::init<int, int, int, int, int, int64_t, std::vector<uintptr_t>>(), py::arg("device"), py::arg("world"),
             py::arg("first"), py::arg("ranks"), py::arg("blocks"), py::arg("region"), py::arg("inboxes"))
        .def("launch", &Workspace::launch, ReleaseGil())
        .def("shape", &Workspace::shape)
        .def("error", &Workspace::error)
        .def("preset", &Workspace::preset, ReleaseGil())
        .def("close", &Workspace::close, ReleaseGil());
}
