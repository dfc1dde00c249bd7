// "cuda" as a device type that a PyTorch built without CUDA can name: enough for fake tensors, which hold no memory.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
