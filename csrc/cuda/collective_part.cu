// The fused collectives of one part (instances.h): FLASHCOMM_PART_TYPE and FLASHCOMM_PART_UNIFORM say which.
#include "cuda/collective_part.h"

#include "cuda/instances.h"
#include "cuda/launch.h"

namespace flashcomm {

using namespace FLASHCOMM_ISA;

namespace {

template <class Reduce, class Gather, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    collective_kernel(const __grid_constant__ Call call) {
    Worker<Reduce, Gather, T>::hire(call).run();
}

}  // namespace

template <class T, bool kUniform>
Kernel CollectivePart<T, kUniform>::kernel(const Request& request, const Setting& reduce, const Setting& gather,
                                           const Capacity& capacity) {
    Kernel kernel;
    with_legs_of<T, kUniform>(reduce, gather, !request.residuals.empty(), [&](auto first, auto second) {
        using Reduce = typename decltype(first)::type;
        using Gather = typename decltype(second)::type;
        using W = Worker<Reduce, Gather, T>;
        kernel.shape = W::shape((Collective)request.kind, request.numel, request.slice, capacity, reduce, gather);
        kernel.shared_bytes = W::shared_bytes(kernel.shape, reduce, gather);
        kernel.function = collective_kernel<Reduce, Gather, T>;
    });
    return kernel;
}

template struct CollectivePart<FLASHCOMM_PART_TYPE, FLASHCOMM_PART_UNIFORM>;

}  // namespace flashcomm
